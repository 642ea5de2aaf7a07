"""Gated linear attention's own kernels for a GPU, in JAX's interpreter for it, against float64 numpy: values, states, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqmodels import ops
from seqmodels.ops.kernels.gpu import gated_linear_attention
from tests.ops import test_gated_linear_attention as xla
from tests.ops.kernels.gpu.test_chunk_scan import TOLERANCE, attention, differentiate, stacked
from tests.ops.kernels.lowering import lower
from tests.ops.kernels.running import kernels_of
from tests.ops.test_gated_linear_attention import marks, narrow, sample

pytestmark = pytest.mark.gpu_kernels

# Sizes that fill a tile and sizes that do not, one block of key channels and two.
SIGNATURES = {
    "no decay": {"steps": 7, "channels": 64, "width": 64},
    "no decay, groups": {"steps": 130, "channels": 72, "width": 64, "heads": 2, "groups": 1},
    "no decay, bonus": {"steps": 65, "channels": 64, "width": 64, "bonus": True},
    "per head": {"steps": 130, "channels": 64, "width": 64, "decay": "head"},
    "per head, groups": {"steps": 65, "channels": 40, "width": 24, "decay": "head", "heads": 4, "groups": 2},
    "per head, bonus": {"steps": 70, "channels": 128, "width": 64, "decay": "head", "bonus": True},
    "per channel": {"steps": 130, "channels": 64, "width": 64, "decay": "channel", "batch": 2},
    "per channel, groups": {"steps": 70, "channels": 128, "width": 80, "decay": "channel", "heads": 2, "groups": 1},
    "per channel, bonus": {"steps": 70, "channels": 64, "width": 128, "decay": "channel", "bonus": True},
    # More value channels than one kernel makes gradients of.
    "no decay, wide": {"steps": 65, "channels": 64, "width": 129},
    "per head, wide, groups": {"steps": 65, "channels": 40, "width": 136, "decay": "head", "heads": 2, "groups": 1},
    "per channel, wide": {"steps": 65, "channels": 64, "width": 136, "decay": "channel"},
    # More key channels than a state in registers has.
    "per head, wide keys, groups": {"steps": 65, "channels": 140, "width": 64, "decay": "head", "heads": 2, "groups": 1},
    "per channel, wide keys, bonus": {"steps": 65, "channels": 140, "width": 40, "decay": "channel", "bonus": True, "heads": 2},
}


@pytest.mark.parametrize("documents", [True, False], ids=["documents", "one document"])
@pytest.mark.parametrize("signature", SIGNATURES)
def test_values_states_and_gradients(signature, documents):
    inputs = sample(**{"batch": 1, "heads": 1} | SIGNATURES[signature])
    found = attention(inputs, marks(inputs, (5, inputs["q"].shape[1] - 1)) if documents else None)
    assert max(found.values()) < TOLERANCE, found


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    steps=st.integers(1, 130),
    channels=st.integers(1, 128),
    width=st.integers(1, 140),
    groups=st.integers(1, 2),
    repeats=st.integers(1, 2),
    decay=st.sampled_from([None, "head", "channel"]),
    bonus=st.booleans(),
)
def test_any_shape(steps, channels, width, groups, repeats, decay, bonus):
    inputs = sample(
        steps=steps, batch=1, heads=groups * repeats, groups=groups, channels=channels, width=width, decay=decay, bonus=bonus
    )
    found = attention(inputs)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_decays_of_any_strength(kind):
    inputs = sample(steps=130, batch=1, heads=1, channels=64, width=64, decay=kind)
    for strength, draw in xla.DECAYS.items():
        inputs["log_decay"] = draw(np.random.default_rng(3), inputs["log_decay"].shape).astype(np.float32)
        found = attention(inputs)
        assert max(found.values()) < TOLERANCE, (strength, found)


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_gate_gradients_in_bfloat16(kind):
    """Sums of like-signed terms: measured 1.6e-3 or less, where q d_q - k d_k, of d_q and d_k in bfloat16, has 7e-3 to 16."""
    inputs = sample(steps=128, batch=1, heads=1, channels=64, width=64, decay=kind)
    with kernels_of("gpu"):
        found = xla.gate_gradient_errors(inputs, differentiate(ops.gated_linear_attention), xla.judge)
    assert max(found.values()) < 4e-3, found


@pytest.mark.parametrize("accident", [np.nan, np.inf])
def test_an_accident_stays_in_its_document_and_head(accident):
    inputs = narrow(sample(steps=70, heads=2, groups=1, channels=64, width=64, decay="channel"))
    reset = marks(inputs, (20, 66), (30,))
    run = jax.jit(lambda x: ops.gated_linear_attention(**x, reset=reset, implementation="pallas")[0])
    spoilt = inputs | {"v": inputs["v"].at[0, 25, 1, 3].set(accident)}
    with kernels_of("gpu"):
        before, after = run(inputs), run(spoilt)
    touched = ~jnp.isfinite(after)
    assert touched[0, 25:66, 1].any(axis=-1).all()
    assert jnp.array_equal(jnp.where(touched, before, after), before)
    assert not touched[0, :25].any() and not touched[0, 66:].any() and not touched[1:].any() and not touched[:, :, 0].any()


def test_float16():
    found = attention(sample(steps=65, batch=1, heads=1, channels=64, width=64, decay="channel"), dtype=jnp.float16)
    assert max(found.values()) < TOLERANCE, found


LOWERED = {
    "no decay, groups": {"channels": 64, "width": 128, "heads": 4, "groups": 2},
    "per head, groups": {"channels": 128, "width": 64, "decay": "head", "heads": 4, "groups": 2},
    "per channel, bonus": {"channels": 128, "width": 128, "decay": "channel", "bonus": True},
    "per channel, wide": {"channels": 128, "width": 256, "decay": "channel"},
}


@pytest.mark.parametrize("signature", LOWERED)
def test_lowers_for_a_gpu_under_checkpoint(signature):
    inputs = narrow(sample(steps=256, **LOWERED[signature]))
    log_decay = inputs.pop("log_decay", None)
    if log_decay is None:
        lower(
            jax.grad(lambda x: jnp.sum(ops.gated_linear_attention(**x, implementation="pallas")[0].astype(jnp.float32))), inputs
        )
    else:
        lower(jax.grad(functools.partial(stacked, implementation="pallas", wrap=jax.checkpoint)), log_decay, inputs)


def test_lowers_for_a_gpu_with_documents_and_a_bonus():
    inputs = narrow(sample(steps=256, channels=128, width=128, decay="channel", bonus=True))

    def loss(x, reset):
        return jnp.sum(ops.gated_linear_attention(**x, reset=reset, implementation="pallas")[0].astype(jnp.float32))

    lower(jax.grad(loss), inputs, marks(inputs, (5, 200)))


def test_what_the_kernel_lacks_is_said():
    def ask(width=64, steps=4, **changes):
        q, v = jnp.zeros((1, steps, 1, 64), jnp.bfloat16), jnp.zeros((1, steps, 1, width), jnp.bfloat16)
        arguments = {"q": q, "k": q, "v": v, "decays": 1, "precision": jax.lax.Precision.DEFAULT, "chunk_size": 64}
        return gated_linear_attention.unsupported_reason(**arguments | changes)

    assert ask() is None and ask(chunk_size=16) is None  # one chunk, whatever its bound
    assert "64 steps, not 16" in ask(steps=40, chunk_size=16)
    assert ask(width=136) is None
    assert "float32" in ask(precision=jax.lax.Precision.HIGHEST)
    assert ask(q=jnp.zeros((1, 4, 1, 256), jnp.bfloat16)) is None
