"""The forms of gated linear attention (or another op) under test, compiled once per form and signature."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from seqmodels.ops import compile_for, gated_linear_attention, interpret
from tests.ops.judge import distance, relative_error
from tests.programs import fast_jit

# name -> (implementation, chunk size, what it is traced for: chunks one by one is what a CPU gets, together any other device)
FORMS = {
    "recurrent": ("recurrent", None, contextlib.nullcontext),
    "associative": ("associative", None, contextlib.nullcontext),
    "parallel": ("parallel", None, contextlib.nullcontext),
    "chunked": ("chunked", 16, contextlib.nullcontext),
    "chunked_together": ("chunked", 7, functools.partial(compile_for, "tpu")),
}
DEFAULT = ("chunked",)  # what every op computes by where nothing is said of a form, of several steps
# The kernels in their interpreter, tested on fewer cases: it takes longer.
KERNELS = {
    "pallas_tpu": ("pallas", 16, functools.partial(interpret, "tpu")),
    "pallas_tpu_default": ("pallas", None, functools.partial(interpret, "tpu")),
}


@functools.cache
def evaluate(form, op=gated_linear_attention):
    """(inputs, reset) -> (o, state); a function of arrays, compiled once per signature."""
    return fast_jit(functools.partial(call, form, op=op))


@functools.cache
def differentiate(form, op=gated_linear_attention):
    """(inputs, reset, cotangents) -> ((o, state), gradients by input)."""

    def run(inputs, reset, cotangents):
        outputs, pull = jax.vjp(lambda inputs: call(form, inputs, reset, op=op), inputs)
        return outputs, pull(cotangents)[0]

    return fast_jit(run)


def call(form, inputs, reset, *, op=gated_linear_attention):
    """Not compiled: for use under other transformations."""
    with traced_for(form):
        return op(**inputs, reset=reset, **options(form))


def options(form):
    implementation, chunk_size, _ = (FORMS | KERNELS)[form]
    return {"implementation": implementation, "chunk_size": chunk_size}


def traced_for(form):
    """The context in which the op chooses the form's schedule."""
    return (FORMS | KERNELS)[form][2]()


def marks(inputs, *rows):
    """Starts of documents [B, T], of each row at the steps given."""
    over_time = next(inputs[name] for name in ("q", "u", "x", "a") if name in inputs)
    reset = np.zeros(over_time.shape[:2], bool)
    for row, steps in enumerate(rows):
        reset[row, list(steps)] = True
    return reset


def cotangents_for(inputs, seed=1):
    """Of outputs that are shaped like an input, and of the state."""
    rng = np.random.default_rng(seed)
    like = next(inputs[name] for name in ("v", "u", "x") if name in inputs), inputs["state"]
    return tuple(rng.standard_normal(x.shape).astype(np.float32) for x in like)


def assert_a_cut_changes_nothing(evaluate, inputs, over_time, tolerance):
    """Three calls that carry the state are one call over 37 steps.

    Args:
      evaluate: (inputs, reset) -> (outputs, state).
      over_time: names of the inputs that have steps.
    """
    whole, whole_state = evaluate(inputs, None)
    state, pieces = inputs["state"], []
    for piece in (slice(0, 1), slice(1, 17), slice(17, 37)):
        o, state = evaluate(inputs | {name: inputs[name][:, piece] for name in over_time} | {"state": state}, None)
        pieces.append(o)
    assert distance(np.concatenate(pieces, axis=1), whole) < tolerance
    assert distance(state, whole_state) < tolerance


def assert_transformations_agree(op, form, inputs, reset, cotangents, tolerance):
    """vmap of checkpoint, and a scan over layers, give the plain gradient. `op` has `call` and `differentiate`, as this module."""
    plain = op.differentiate("chunked")(inputs, reset, cotangents)[1]

    def loss(inputs, reset, cotangents):
        o, state = op.call(form, inputs, reset)
        return jnp.sum(o * cotangents[0]) + jnp.sum(state * cotangents[1])

    by_row = jax.tree.map(lambda x: x[:, None], (inputs, reset, cotangents))
    mapped = fast_jit(jax.vmap(jax.grad(jax.checkpoint(loss))))(*by_row)
    for name in inputs:
        assert relative_error(mapped[name][:, 0], plain[name]) < tolerance, name

    def through_layers(form):
        def loss(v):
            def layer(v, _):
                return op.call(form, inputs | {"v": v}, reset)[0], None

            return jnp.sum(lax.scan(layer, v, None, length=2)[0] * cotangents[0])

        return fast_jit(jax.grad(loss))(inputs["v"])

    assert relative_error(through_layers(form), through_layers("chunked")) < tolerance
