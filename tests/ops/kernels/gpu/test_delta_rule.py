"""The delta rule's own kernels for a GPU, in JAX's interpreter for it, against float64 numpy: values, states, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqmodels import ops
from seqmodels.ops.kernels.gpu import delta_rule
from tests.ops import test_delta_rule as xla
from tests.ops import test_gated_linear_attention as of_attention
from tests.ops.kernels.gpu.test_chunk_scan import DECAYS, TOLERANCE, delta, differentiate
from tests.ops.kernels.lowering import lower
from tests.ops.kernels.running import kernels_of
from tests.ops.test_delta_rule import marks, sample
from tests.ops.test_gated_linear_attention import narrow

pytestmark = pytest.mark.gpu_kernels

# Sizes that fill a tile and sizes that do not, one block of channels and two.
SIGNATURES = {
    "no decay": {"steps": 65, "channels": 64, "width": 64},
    "no decay, groups": {"steps": 70, "channels": 72, "width": 80, "heads": 2, "groups": 1},
    "per head": {"steps": 65, "channels": 128, "width": 64, "decay": "head"},
    "per head, groups": {"steps": 130, "channels": 40, "width": 24, "decay": "head", "heads": 2, "groups": 1},
    "per channel": {"steps": 65, "channels": 128, "width": 64, "decay": "channel"},
    "per channel, groups": {"steps": 70, "channels": 40, "width": 72, "decay": "channel", "heads": 2, "groups": 1},
    "no decay, wide keys": {"steps": 65, "channels": 140, "width": 72},
    "per channel, wide keys": {"steps": 65, "channels": 136, "width": 64, "decay": "channel"},
    "per head, wide": {"steps": 65, "channels": 64, "width": 136, "decay": "head"},
}


@pytest.mark.parametrize("documents", [True, False], ids=["documents", "one document"])
@pytest.mark.parametrize("signature", SIGNATURES)
def test_values_states_and_gradients(signature, documents):
    inputs = sample(**{"batch": 1, "heads": 1} | SIGNATURES[signature])
    found = delta(inputs, marks(inputs, (5, inputs["q"].shape[1] - 1)) if documents else None)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("decay", [None, "head", "channel"])
def test_alike_keys(decay):
    """Updates of changing sign that almost cancel: in the forward pass what they go through is float16."""
    inputs = sample(steps=128, batch=1, heads=1, channels=128, width=64, correlation=0.95, largest=1.0, decay=decay, low=-0.1)
    found = delta(inputs)
    assert found["o"] < 5e-3, found  # measured 3e-3 or less; the state, written by a bfloat16 product, 6e-3
    assert max(found.values()) < 2e-2, found  # 1.4e-2, beta's gradient


@settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    steps=st.integers(1, 130),
    channels=st.integers(1, 128),
    width=st.integers(1, 140),
    groups=st.integers(1, 2),
    repeats=st.integers(1, 2),
    decay=st.sampled_from([None, "head", "channel"]),
)
def test_any_shape(steps, channels, width, groups, repeats, decay):
    inputs = sample(steps=steps, batch=1, heads=groups * repeats, groups=groups, channels=channels, width=width, decay=decay)
    found = delta(inputs)
    # Errors of a few numbers do not average out: with one of each, the state's gradient has a condition number of 4.2, and the
    # kernel's products take bfloat16 (1.4e-2; in float32 the other forms have none).
    few = steps * min(channels, width) < 64
    assert max(found.values()) < (3 * TOLERANCE if few else TOLERANCE), found


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_decays_of_any_strength(kind):
    inputs = sample(steps=66, batch=1, heads=1, channels=64, width=64, decay=kind)
    for strength, draw in DECAYS.items():
        inputs["log_decay"] = draw(np.random.default_rng(3), inputs["log_decay"].shape).astype(np.float32)
        found = delta(inputs)
        assert max(found.values()) < TOLERANCE, (strength, found)


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_gate_gradients_in_bfloat16(kind):
    """Sums of like-signed terms, as gated linear attention's."""
    inputs = sample(steps=128, batch=1, heads=1, channels=64, width=64, decay=kind)
    with kernels_of("gpu"):
        found = of_attention.gate_gradient_errors(inputs, differentiate(ops.delta_rule), xla.judge)
    assert max(found.values()) < 4e-3, found


@pytest.mark.parametrize("accident", [np.nan, np.inf])
def test_an_accident_stays_in_its_document_and_head(accident):
    inputs = narrow(sample(steps=70, heads=2, groups=1, channels=64, width=64))
    reset = marks(inputs, (20, 66), (30,))
    run = jax.jit(lambda x: ops.delta_rule(**x, reset=reset, implementation="pallas")[0])
    spoilt = inputs | {"v": inputs["v"].at[0, 25, 1, 3].set(accident)}
    with kernels_of("gpu"):
        before, after = run(inputs), run(spoilt)
    touched = ~jnp.isfinite(after)
    assert touched[0, 25:66, 1].any(axis=-1).all()
    assert jnp.array_equal(jnp.where(touched, before, after), before)
    assert not touched[0, :25].any() and not touched[0, 66:].any() and not touched[1:].any() and not touched[:, :, 0].any()


LOWERED = {
    "no decay, groups": {"channels": 64, "width": 128, "heads": 4, "groups": 2},
    "per head": {"channels": 128, "width": 128, "decay": "head", "heads": 2},
    "per channel, wide": {"channels": 128, "width": 256, "decay": "channel", "heads": 2},
}


@pytest.mark.parametrize("signature", LOWERED)
def test_lowers_for_a_gpu_under_checkpoint(signature):
    inputs = narrow(sample(steps=256, **LOWERED[signature]))

    def loss(x):
        run = jax.checkpoint(functools.partial(ops.delta_rule, implementation="pallas"))
        return jnp.sum(run(**x)[0].astype(jnp.float32))

    lower(jax.grad(loss), inputs)


def test_what_the_kernel_lacks_is_said():
    def ask(width=64, steps=4, **changes):
        q, v = jnp.zeros((1, steps, 1, 64), jnp.bfloat16), jnp.zeros((1, steps, 1, width), jnp.bfloat16)
        arguments = {"q": q, "k": q, "v": v, "decays": 1, "precision": jax.lax.Precision.DEFAULT, "chunk_size": 64}
        return delta_rule.unsupported_reason(**arguments | changes)

    assert ask() is None and ask(chunk_size=16) is None  # one chunk, whatever its bound
    assert "64 steps, not 16" in ask(steps=40, chunk_size=16)
    assert ask(width=136) is None
    assert ask(decays=64) is None
    assert "float32" in ask(precision=jax.lax.Precision.HIGHEST)
    assert ask(q=jnp.zeros((1, 4, 1, 256), jnp.bfloat16)) is None
    assert "K = 257" in ask(q=jnp.zeros((1, 4, 1, 257), jnp.bfloat16))
