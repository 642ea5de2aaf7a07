"""The GPU's recurrence over chunks, in JAX's interpreter for it, against float64 numpy: values, states, every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqmodels import ops
from seqmodels.ops.kernels.gpu import chunk_scan
from tests.ops import test_delta_rule as of_delta_rule
from tests.ops import test_gated_linear_attention as of_attention
from tests.ops.judge import relative_error
from tests.ops.kernels.lowering import lower
from tests.ops.kernels.running import kernels_of
from tests.ops.test_delta_rule import sample as delta_sample
from tests.ops.test_gated_linear_attention import cotangents_for, marks, narrow, sample

pytestmark = pytest.mark.gpu_kernels

# bfloat16 q, k, v and products against float64 on the same inputs, relative to the largest value; measured 5e-3 or less
TOLERANCE = 1e-2


SHORT = functools.partial(ops.delta_rule, chunk_size=32)  # chunks that the delta rule's own kernels do not take
JUDGES = {ops.gated_linear_attention: of_attention.judge, ops.delta_rule: of_delta_rule.judge, SHORT: of_delta_rule.judge}


@functools.cache
def differentiate(op):
    def compute(inputs, reset, cotangents):
        outputs, pull = jax.vjp(lambda x: op(**x, reset=reset, implementation="pallas"), inputs)
        return outputs, pull(cotangents)[0]

    return jax.jit(compute)


def errors(op, inputs, reset=None, dtype=jnp.bfloat16):
    """Relative error of the outputs, the final state and every gradient."""
    inputs = narrow(inputs, dtype)
    d_o, d_state = cotangents_for(inputs)
    d_o = jnp.asarray(d_o, dtype)
    with kernels_of("gpu"):
        (o, state), grads = differentiate(op)(inputs, reset, (d_o, d_state))
    expected_o, expected_state, expected = JUDGES[op](inputs, reset, d_o, d_state)
    found = {name: relative_error(grads[name], expected[name]) for name in inputs}
    return found | {"o": relative_error(o, expected_o), "final state": relative_error(state, expected_state)}


attention = functools.partial(errors, ops.gated_linear_attention)
delta = functools.partial(errors, ops.delta_rule)
short_delta = functools.partial(errors, SHORT)

# What gated linear attention's own kernels leave to this one: decays on both sides.
SIGNATURES = {
    "both sides": {"steps": 70, "channels": 16, "width": 70, "batch": 2},
    "both sides, groups": {"steps": 65, "channels": 72, "width": 130, "heads": 2, "groups": 1},
}


@pytest.mark.parametrize("signature", SIGNATURES)
def test_attention(signature):
    inputs = sample(**{"batch": 1, "heads": 1, "decay": "channel", "value_decay": True} | SIGNATURES[signature])
    found = attention(inputs, marks(inputs, (5, inputs["q"].shape[1] - 1)))
    assert max(found.values()) < TOLERANCE, found


DELTA = {
    "no decay": {"steps": 65, "channels": 64, "width": 64},
    "per head, groups": {"steps": 70, "channels": 40, "width": 24, "decay": "head", "heads": 2, "groups": 1},
    "per channel": {"steps": 65, "channels": 96, "width": 80, "decay": "channel"},
}


@pytest.mark.parametrize("signature", DELTA)
def test_delta_rule(signature):
    inputs = delta_sample(**{"batch": 1, "heads": 1} | DELTA[signature])
    found = short_delta(inputs, marks(inputs, (5, inputs["q"].shape[1] - 1)))
    assert max(found.values()) < TOLERANCE, found


def test_alike_keys():
    inputs = delta_sample(
        steps=128, batch=1, heads=1, channels=128, width=64, correlation=0.95, largest=1.0, decay="channel", low=-0.1
    )
    found = short_delta(inputs)
    assert max(found.values()) < 3e-2, found


@settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    steps=st.integers(33, 100),
    channels=st.integers(1, 128),
    width=st.integers(1, 130),
    groups=st.integers(1, 2),
    repeats=st.integers(1, 2),
)
def test_any_shape(steps, channels, width, groups, repeats):
    inputs = delta_sample(
        steps=steps, batch=1, heads=groups * repeats, groups=groups, channels=channels, width=width, decay="channel"
    )
    found = short_delta(inputs)
    assert max(found.values()) < TOLERANCE, found


DECAYS = {
    "to -5": lambda rng, shape: -rng.uniform(1e-2, 5, shape),
    "-20": lambda rng, shape: np.full(shape, -20.0),
    "to -300": lambda rng, shape: -np.exp(rng.uniform(np.log(1e-3), np.log(300), shape)),
    "one shut gate": lambda rng, shape: np.where(np.arange(shape[1])[None, :, None, None] == 43, -np.inf, -0.01) * np.ones(shape),
}


@pytest.mark.parametrize("op", [attention, short_delta], ids=["attention", "delta_rule"])
def test_decays_of_any_strength(op):
    make = functools.partial(sample, value_decay=True) if op is attention else delta_sample
    inputs = make(steps=66, batch=1, heads=1, channels=64, width=64, decay="channel")
    for strength, draw in DECAYS.items():
        inputs["log_decay"] = draw(np.random.default_rng(3), inputs["log_decay"].shape).astype(np.float32)
        found = op(inputs)
        assert max(found.values()) < TOLERANCE, (strength, found)


def test_gate_gradients_in_bfloat16():
    """Sums of like-signed terms: measured 1.6e-3 or less, where q d_q - k d_k, of d_q and d_k in bfloat16, has 7e-3 to 16."""
    inputs = delta_sample(steps=128, batch=1, heads=1, channels=64, width=64, decay="channel")
    with kernels_of("gpu"):
        found = of_attention.gate_gradient_errors(inputs, differentiate(SHORT), of_delta_rule.judge)
    assert max(found.values()) < 4e-3, found


def test_float16():
    inputs = sample(steps=65, batch=1, heads=1, channels=64, width=64, decay="channel", value_decay=True)
    found = attention(inputs, dtype=jnp.float16)
    assert max(found.values()) < TOLERANCE, found


def stacked(log_decay, inputs, implementation, wrap=lambda layer: layer):
    """Two layers of one set of weights, as a model scans them."""

    def layer(v, _):
        o, _ = ops.gated_linear_attention(**inputs | {"v": v, "log_decay": log_decay}, implementation=implementation)
        return 0.1 * o, None

    v, _ = jax.lax.scan(wrap(layer), inputs["v"], None, length=2)
    return jnp.sum(v.astype(jnp.float32) ** 2)


def test_gradient_through_a_scan_over_layers():
    inputs = narrow(sample(steps=65, batch=1, heads=1, channels=64, width=136, decay="channel"))
    gradient = jax.grad(stacked)
    with kernels_of("gpu"):
        found = jax.jit(functools.partial(gradient, implementation="pallas"))(inputs["log_decay"], inputs)
    expected = jax.jit(functools.partial(gradient, implementation="chunked"))(inputs["log_decay"], inputs)
    assert relative_error(found, expected) < 2 * TOLERANCE


LOWERED = {
    "both sides": {"channels": 64, "width": 128, "decay": "channel", "value_decay": True},
}


@pytest.mark.parametrize("signature", LOWERED)
def test_lowers_for_a_gpu_under_checkpoint(signature):
    inputs = narrow(sample(steps=256, **LOWERED[signature]))
    lower(jax.grad(functools.partial(stacked, implementation="pallas", wrap=jax.checkpoint)), inputs["log_decay"], inputs)


def test_delta_rule_lowers_for_a_gpu():
    inputs = narrow(delta_sample(steps=256, channels=128, width=128, decay="channel"))
    lower(jax.grad(lambda x: jnp.sum(SHORT(**x, implementation="pallas")[0].astype(jnp.float32))), inputs)


def test_what_the_kernel_lacks_is_said():
    def ask(**changes):
        arguments = {"precision": jax.lax.Precision.DEFAULT, "channels": 64, "width": 64, "chunk_size": 64}
        return chunk_scan.unsupported_reason(**arguments | changes)

    assert ask() is None
    assert "float32" in ask(precision=jax.lax.Precision.HIGHEST)
    assert "K = 256" in ask(channels=256)
    assert "128 steps" in ask(chunk_size=128)
    wide = sample(steps=4, batch=1, heads=1)
    with kernels_of("gpu"), pytest.raises(NotImplementedError, match="float32"):
        ops.gated_linear_attention(**wide, implementation="pallas")
