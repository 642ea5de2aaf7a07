"""Splash attention behind softmax_attention, in its interpreter: against the definition, and lowered for a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from seqmodels import ops
from seqmodels.ops import documents, softmax_attention
from seqmodels.ops.kernels.tpu import softmax_attention as kernel
from seqmodels.ops.softmax_attention import init_cache
from tests.ops.kernels.running import kernels_of
from tests.ops.test_softmax_attention import definition, draw
from tests.programs import fast_jit

T = 200


@pytest.fixture
def small_tiles(monkeypatch):
    """Sequences of 200 steps are two tiles of 128, the second one padded."""
    monkeypatch.setattr(kernel, "MAX_TILE", 128)


def starts():
    """Documents of one step, of more than a tile, and up to the end."""
    return jnp.zeros((2, T), bool).at[0, jnp.array([3, 4, 150])].set(True).at[1, 0].set(True)


def attend(q, k, v, reset, window, interpret=True):
    """The kernel by itself, which the op keeps from float32 inputs: in the interpreter it is exact for them."""
    (B, _, H, K), G = q.shape, k.shape[2]
    by_head = q.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4), *(jnp.swapaxes(x, 1, 2) for x in (k, v))
    ids = None if reset is None else documents.segment_ids(reset)
    o = kernel.attend(*by_head, ids, window, interpret=interpret)
    return o.transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1)


@pytest.mark.parametrize("window, groups, reset", [(None, 1, True), (70, 2, False)])
def test_values_and_gradients(window, groups, reset, small_tiles):
    q, k, v = draw(20, T, heads=2, groups=groups, key_dim=16, value_dim=24)
    reset = starts() if reset else None

    def run(form, q, k, v):
        o, pull = jax.vjp(functools.partial(form, reset=reset, window=window), q, k, v)
        return o, pull(jnp.cos(o))

    def parallel(q, k, v, *, reset, window):
        return softmax_attention(q, k, v, reset=reset, window=window, implementation="parallel")[0]

    o, gradients = fast_jit(functools.partial(run, attend))(q, k, v)
    _, expected = fast_jit(functools.partial(run, parallel))(q, k, v)
    np.testing.assert_allclose(o, definition(q, k, v, reset=reset, window=window), atol=2e-6, rtol=0)
    for one, other in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=0)


def test_the_op_in_bfloat16_keeps_a_nan_in_its_document(small_tiles):
    q, k, v = draw(21, T, heads=2, groups=1, key_dim=16, value_dim=16, dtype=jnp.bfloat16)
    reset = starts()
    bad = v.at[0, 60, 0, 3].set(jnp.nan)

    @fast_jit
    def run(q, k, v):
        with kernels_of("tpu"), ops.record_choices() as choices:
            o, pull = jax.vjp(lambda *x: softmax_attention(*x, reset=reset)[0], q, k, v)
        assert list(choices) == ["softmax_attention: pallas tpu/softmax_attention"]
        return o, pull(jnp.where(jnp.isfinite(o), 1, jnp.nan).astype(o.dtype))

    o, gradients = run(q, k, v)
    spoiled_o, spoiled_gradients = run(q, k, bad)
    spoiled = np.zeros((2, T), bool)
    spoiled[0, 60:150] = True  # the document from step 4 on, from the NaN on
    np.testing.assert_array_equal(np.isnan(np.asarray(spoiled_o, np.float32)).all(axis=(2, 3)), spoiled)
    np.testing.assert_allclose(np.asarray(o, np.float64), definition(q, k, v, reset=reset), atol=0.02, rtol=0)
    clean = np.ones((2, T), bool)
    clean[0, 4:150] = False
    for one, other in zip((spoiled_o, *spoiled_gradients), (o, *gradients), strict=True):
        np.testing.assert_array_equal(np.asarray(one)[clean], np.asarray(other)[clean])


@pytest.mark.slow
def test_in_the_interpreter_that_models_a_tpus_memory(small_tiles):
    q, k, v = draw(22, T, batch=1, heads=1, groups=1, key_dim=16, value_dim=16)
    o = jax.jit(functools.partial(attend, reset=None, window=None, interpret=pltpu.InterpretParams()))(q, k, v)
    np.testing.assert_allclose(o, definition(q, k, v), atol=2e-6, rtol=0)


@pytest.mark.parametrize("num_steps, window, tile, padding", [
    (1, None, 128, 127), (512, None, 512, 0), (513, None, 384, 255), (640, None, 384, 128), (4096, None, 512, 0),
    (4096, 100, 128, 0), (300, 129, 256, 212),
])  # fmt: skip
def test_tiles_fill_the_sequence(num_steps, window, tile, padding):
    assert kernel._tiles(num_steps, window) == (tile, padding)


@pytest.mark.parametrize("width", [32, 64, 128])
def test_lowers_for_a_tpu_with_its_gradient(width):
    x = jax.ShapeDtypeStruct((2, 300, 2, width), jnp.bfloat16)

    def loss(q, k, v):
        return jnp.sum(softmax_attention(q, k, v, implementation="pallas")[0].astype(jnp.float32))

    with ops.compile_for("tpu"):
        program = jax.export.export(jax.jit(jax.grad(loss, argnums=(0, 1, 2))), platforms=["tpu"])(x, x, x).mlir_module()
    assert program.count("tpu_custom_call") >= 3  # forward, and backward for the queries and for the keys


def test_what_it_lacks():
    q, k, v = draw(23, 4)
    narrow = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    cache = init_cache(q.shape[0], 8, *k.shape[2:], v.shape[3], dtype=jnp.bfloat16)
    with ops.compile_for("tpu"):
        with pytest.raises(NotImplementedError, match="in bfloat16, and inputs are float32"):
            softmax_attention(q, k, v, implementation="pallas")
        with pytest.raises(NotImplementedError, match="no KV cache"):
            softmax_attention(*narrow, cache=cache, implementation="pallas")
        with ops.record_choices() as choices:
            jax.eval_shape(softmax_attention, q, k, v)
            jax.eval_shape(softmax_attention, *narrow)
        assert list(choices) == [
            "softmax_attention: chunked, not tpu/softmax_attention: splash attention multiplies in bfloat16, "
            "and inputs are float32, float32, float32",
            "softmax_attention: pallas tpu/softmax_attention",
        ]
    with ops.compile_for("gpu"), pytest.raises(NotImplementedError, match="needs an NVIDIA GPU at hand"):
        softmax_attention(*narrow, implementation="pallas")
