"""The GPU's recurrence over chunks, in JAX's interpreter for it, against float64 numpy: values, states, every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import ops
from seqmodels.ops.kernels import chunk_core_gpu
from tests.ops import judge
from tests.ops.judge import relative_error
from tests.ops.test_delta_rule import judge as delta_judge
from tests.ops.test_delta_rule import sample as delta_sample
from tests.ops.test_gated_linear_attention import cotangents_for, marks, sample

pytestmark = pytest.mark.gpu_kernels

# bfloat16 q, k, v and products against float64 on the same inputs, relative to the largest value; measured 5e-3 or less
TOLERANCE = 1e-2
NARROW = ("q", "k", "v")


def attention_judge(inputs, reset, *cotangents):
    o, state, tape = judge.run(inputs, reset)
    return o, state, judge.gradients(tape, *cotangents)


JUDGES = {ops.gated_linear_attention: attention_judge, ops.delta_rule: delta_judge}


def errors(op, inputs, reset=None, dtype=jnp.bfloat16, implementation="pallas"):
    """Relative error of the outputs, the final state and every gradient."""
    inputs = {name: jnp.asarray(x, dtype if name in NARROW else None) for name, x in inputs.items()}
    d_o, d_state = cotangents_for(inputs)
    d_o = jnp.asarray(d_o, dtype)

    @jax.jit
    def compute(inputs, reset, cotangents):
        outputs, pull = jax.vjp(lambda x: op(**x, reset=reset, implementation=implementation), inputs)
        return outputs, pull(cotangents)[0]

    with ops.interpret("gpu"):
        (o, state), grads = compute(inputs, reset, (d_o, d_state))
    expected_o, expected_state, expected = JUDGES[op](inputs, reset, d_o, d_state)
    found = {name: relative_error(grads[name], expected[name]) for name in inputs}
    return found | {"o": relative_error(o, expected_o), "final state": relative_error(state, expected_state)}


attention = functools.partial(errors, ops.gated_linear_attention)
delta = functools.partial(errors, ops.delta_rule)

# Sizes that fill a tile and sizes that do not, one block of columns and two.
SIGNATURES = {
    "no decay": {"steps": 70, "channels": 64, "width": 64},
    "per head": {"steps": 130, "channels": 64, "width": 64, "decay": "head"},
    "per head, groups": {"steps": 65, "channels": 40, "width": 24, "decay": "head", "heads": 4, "groups": 2},
    "per channel": {"steps": 130, "channels": 64, "width": 64, "decay": "channel"},
    "per channel, bonus, groups": {
        "steps": 70, "channels": 72, "width": 80, "decay": "channel", "bonus": True, "heads": 2, "groups": 1
    },
    "both sides": {"steps": 70, "channels": 16, "width": 70, "decay": "channel", "value_decay": True, "batch": 2},
}  # fmt: skip


@pytest.mark.parametrize("signature", SIGNATURES)
def test_attention(signature):
    inputs = sample(**{"batch": 1, "heads": 1} | SIGNATURES[signature])
    found = attention(inputs, marks(inputs, (5, 64)))
    assert max(found.values()) < TOLERANCE, found


DELTA = {
    "no decay": {"steps": 65, "channels": 64, "width": 64},
    "per head, groups": {"steps": 130, "channels": 40, "width": 24, "decay": "head", "heads": 2, "groups": 1},
    "per channel": {"steps": 130, "channels": 96, "width": 80, "decay": "channel"},
}


@pytest.mark.parametrize("signature", DELTA)
def test_delta_rule(signature):
    inputs = delta_sample(**{"batch": 1, "heads": 1} | DELTA[signature])
    found = delta(inputs, marks(inputs, (5, 64)))
    assert max(found.values()) < TOLERANCE, found


DECAYS = {
    "to -5": lambda rng, shape: -rng.uniform(1e-2, 5, shape),
    "-20": lambda rng, shape: np.full(shape, -20.0),
    "to -300": lambda rng, shape: -np.exp(rng.uniform(np.log(1e-3), np.log(300), shape)),
    "one shut gate": lambda rng, shape: np.where(np.arange(shape[1])[None, :, None, None] == 43, -np.inf, -0.01)
    * np.ones(shape),
}


@pytest.mark.parametrize("op", [attention, delta], ids=["attention", "delta_rule"])
@pytest.mark.parametrize("strength", DECAYS)
def test_decays_of_any_strength(op, strength):
    make = sample if op is attention else delta_sample
    inputs = make(steps=130, batch=1, heads=1, channels=64, width=64, decay="channel")
    inputs["log_decay"] = DECAYS[strength](np.random.default_rng(3), inputs["log_decay"].shape).astype(np.float32)
    found = op(inputs)
    assert max(found.values()) < TOLERANCE, found


def test_float16_and_under_scan_and_checkpoint():
    inputs = sample(steps=65, batch=1, heads=1, channels=64, width=64, decay="channel")
    assert max(attention(inputs, dtype=jnp.float16).values()) < TOLERANCE
    narrow = {name: jnp.asarray(x, jnp.bfloat16 if name in NARROW else None) for name, x in inputs.items()}

    def layers(log_decay, implementation):
        def layer(v, _):
            o, _ = ops.gated_linear_attention(
                **narrow | {"v": v, "log_decay": log_decay}, implementation=implementation
            )
            return 0.1 * o, None

        v, _ = jax.lax.scan(jax.checkpoint(layer), narrow["v"], None, length=2)
        return jnp.sum(v.astype(jnp.float32) ** 2)

    with ops.interpret("gpu"):
        found = jax.jit(jax.grad(functools.partial(layers, implementation="pallas")))(narrow["log_decay"])
    expected = jax.jit(jax.grad(functools.partial(layers, implementation="chunked")))(narrow["log_decay"])
    assert relative_error(found, expected) < 2 * TOLERANCE


def test_what_the_kernel_lacks_is_said():
    def ask(**changes):
        arguments = {"precision": jax.lax.Precision.DEFAULT, "channels": 64, "width": 64, "chunk_size": 64}
        return chunk_core_gpu.lacks(**arguments | changes)

    assert ask() is None
    assert "float32" in ask(precision=jax.lax.Precision.HIGHEST)
    assert "K = 256" in ask(channels=256)
    assert "128 steps" in ask(chunk_size=128)
    wide = sample(steps=4, batch=1, heads=1)
    with ops.interpret("gpu"), pytest.raises(NotImplementedError, match="float32"):
        ops.gated_linear_attention(**wide, implementation="pallas")
