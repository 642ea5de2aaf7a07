"""Every op with its time split over eight virtual devices: ``python -m tests.ops.sequence_parallel_program [OP...]``, JSON
lines.

By op, the largest differences from one device in outputs, the last state and every gradient, with a first state and packed
documents, and without; and the bytes that a device receives for T steps and for 2 T, forward and backward.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels import ops
from seqmodels.config import MeshConfig
from seqmodels.ops.mlstm_cell import MLSTMState
from seqmodels.ops.rotary import document_positions
from seqmodels.ops.softmax_attention import Cache
from seqmodels.training.sharding import make_mesh
from tests.programs import fast_jit

B, T, G, H, K, V, D, N, TAPS = 2, 32, 1, 2, 4, 3, 4, 2, 4
WITH_NAN = ("decay per channel",)  # these cases are run with a NaN in a document, too
STARTS = ((0, 9), (0, 23), (1, 5), (1, 6), (1, 16))  # two in one device's steps, one at the first of them, none in most


def numbers(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def starts(steps: int) -> np.ndarray:
    marks = np.zeros((B, steps), bool)
    marks[tuple(zip(*STARTS))] = True
    return marks


def positions(x, *, state=None, reset=None):
    """As an op: the positions, times something that has a gradient."""
    found = document_positions(x.shape[1], start=state, reset=reset)
    return x * found[:, :, None], jnp.zeros((len(x), 0))


def cases(steps: int) -> dict:
    """By name: the op, its arrays, and the first state. In numpy: for JAX each of these operations is a program to compile."""
    q, k, v = numbers(B, steps, G, K, seed=0), numbers(B, steps, G, K, seed=1) / K**0.5, numbers(B, steps, H, V, seed=2)
    wide_q, wide_k = numbers(B, steps, H, K, seed=3), numbers(B, steps, H, K, seed=4)
    log_decay = -np.abs(numbers(B, steps, H, K, seed=5)) * np.float32(0.2)
    value_log_decay = -np.abs(numbers(B, steps, H, V, seed=6)) * np.float32(0.2)
    unit_k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    beta = sigmoid(numbers(B, steps, H, seed=7))
    state = numbers(B, H, K, V, seed=8)
    x, channels = numbers(B, steps, D, seed=9), numbers(B, D, seed=10)
    modes = (
        np.float32(-0.3) + 0.3j * numbers(D, N, seed=11),
        *(numbers(D, N, seed=i) + 1j * numbers(D, N, seed=i + 1) for i in (12, 14)),
    )
    step_sizes = np.logaddexp(x - 2, np.float32(0))
    dt = np.linspace(0.05, 0.2, D, dtype=np.float32)
    system = {"A": modes[0] * 5, "P": modes[1], "B": modes[2], "C": modes[1] - modes[2], "dt": dt}
    # Input gates so small that exp(-m) bounds the denominator: where q . n nears zero, two forms on one device differ by 2e-4.
    gates = {"input_gate_logit": numbers(B, steps, H, seed=16) - 4, "forget_gate_logit": 2 + numbers(B, steps, H, seed=17)}
    memory = numbers(B, H, K, V, seed=18), numbers(B, H, K, seed=19), numbers(B, H, seed=20)
    counts = np.array([[3, 1], [5, 2]], np.int32)
    cache = Cache(numbers(B, G, 5, K, seed=21), numbers(B, G, 5, V, seed=22), *counts)
    keys = {"q": wide_q, "k": k, "v": v[:, :, :G]}
    gla, delta, chunks = ops.gated_linear_attention, ops.delta_rule, {"chunk_size": 2}
    return {
        "linear_recurrence": (ops.linear_recurrence, {"a": sigmoid(x + 1), "b": x}, channels, {}),
        "complex linear_recurrence": (
            ops.linear_recurrence, {"a": np.complex64(0.9) * np.exp(1j * x), "b": x + 0j}, channels + 0j, {},
        ),
        "linear attention": (gla, {"q": q, "k": k, "v": v}, state, chunks),
        "decay per channel": (gla, {"q": q, "k": k, "v": v, "log_decay": log_decay}, state, chunks),
        "decay on both sides": (
            gla, {"q": q, "k": k, "v": v, "log_decay": log_decay[..., :1], "value_log_decay": value_log_decay}, state, chunks,
        ),
        "bonus": (gla, {"q": q, "k": k, "v": v, "log_decay": log_decay, "bonus": numbers(H, K, seed=23)}, state, chunks),
        "complex decay": (
            ops.complex_gated_linear_attention,
            {"q": wide_q, "k": wide_k, "v": v, "log_decay": log_decay, "angle": 3 * wide_q}, numbers(B, H, 2 * K, V, seed=24), chunks,
        ),
        "delta rule": (delta, {"q": q, "k": unit_k, "v": v, "beta": beta}, state, chunks),
        "gated delta rule": (delta, {"q": q, "k": unit_k, "v": v, "beta": beta, "log_decay": log_decay}, state, chunks),
        "selective_scan": (
            ops.selective_scan,
            {"x": x, "dt": step_sizes, "A": -np.exp(numbers(D, N, seed=25)), "B": numbers(B, steps, N, seed=26),
             "C": numbers(B, steps, N, seed=27)}, numbers(B, D, N, seed=28), {},
        ),
        "mlstm_cell": (ops.mlstm_cell, {"q": wide_q, "k": wide_k, "v": v, **gates}, MLSTMState(*memory), chunks),
        "diagonal_ssm": (
            ops.diagonal_ssm, dict(zip(("u", "dA_minus_1", "dB", "C"), (x, *modes))), numbers(B, D, 2 * N, seed=29), {},
        ),
        "dplr_ssm": (ops.dplr_ssm, {"u": x, **system}, numbers(B, D, 2 * N, seed=29), {}),
        "causal_conv": (
            ops.causal_conv, {"x": x, "weight": numbers(TAPS, D, seed=30), "bias": numbers(D, seed=31)},
            numbers(B, TAPS - 1, D, seed=32), {},
        ),
        "wide causal_conv": (ops.causal_conv, {"x": x, "weight": numbers(12, D, seed=33)}, numbers(B, 11, D, seed=34), {}),
        "document_positions": (positions, {"x": x}, np.array([7, 0], np.int32), {}),
        "token_shift": (ops.token_shift, {"x": x}, channels, {}),
        "softmax_attention": (ops.softmax_attention, keys, cache, {}),
        "windowed softmax_attention": (functools.partial(ops.softmax_attention, window=6), keys, cache, {}),
        "softmax_attention with a window of three devices": (
            functools.partial(ops.softmax_attention, window=21), keys, cache, {},
        ),
    }  # fmt: skip


def program(op, given: dict, options: dict, mesh=None):
    """The compiled gradient: arrays -> (outputs and last state, gradients of what is not whole numbers)."""
    leaves, tree = jax.tree.flatten(given)
    smooth = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def run(smooth_leaves):
        def loss(smooth_leaves):
            whole = list(leaves)
            for i, leaf in zip(smooth, smooth_leaves):
                whole[i] = leaf
            with ops.on_mesh(mesh):
                results = op(**jax.tree.unflatten(tree, whole), **options)
            parts = [x for x in jax.tree.leaves(results) if jnp.issubdtype(x.dtype, jnp.inexact)]
            return sum(jnp.sum(jnp.sin(x.real) + jnp.cos(x.imag)) for x in parts), results

        (_, results), gradients = jax.value_and_grad(loss, has_aux=True)(smooth_leaves)
        return results, gradients

    return run, [leaves[i] for i in smooth]


def difference(expected, found) -> float:
    """The largest over a tree, relative to the largest number of each array."""
    pairs = zip(jax.tree.leaves(jax.device_get(expected)), jax.tree.leaves(jax.device_get(found)), strict=True)
    return max(float(np.abs(x - y).max() / (np.abs(x).max() or 1.0)) for x, y in pairs if x.size)


COLLECTIVES = ("all_gather", "ppermute", "psum", "psum_invariant", "reduce_scatter", "psum_scatter", "pmax")


def received(jaxpr) -> int:
    """Bytes of the results of all collectives over time in a program, as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in COLLECTIVES and "sequence" in str(equation.params):
            total += sum(each.aval.size * each.aval.dtype.itemsize for each in equation.outvars)
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            total += received(inner) * equation.params.get("length", 1) if hasattr(inner, "eqns") else 0
    return total


def measure(name: str) -> dict:
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=1, sequence=4))
    row = {"op": name}
    for steps in (T, 2 * T):
        op, arrays, state, options = cases(steps)[name]
        marks = starts(steps)
        for more in ({}, {"state": state, "reset": marks}):
            kind = "continued" if more else "fresh"
            if "softmax_attention" in name and more:
                more = {"cache": state, "reset": marks}
            run, leaves = program(op, arrays | more, options, mesh)
            row[f"bytes {kind} {steps}"] = received(jax.make_jaxpr(run)(leaves).jaxpr)
            if steps == T:
                one, _ = program(op, arrays | more, options)
                compiled = [fast_jit(each) for each in (one, run)]
                row[kind] = [difference(*pair) for pair in zip(*(each(leaves) for each in compiled))]
                if more and name in WITH_NAN:
                    for x in arrays.values():
                        x[0, STARTS[0][1] + 3] = np.nan
                    _, sick = program(op, arrays | more, options)
                    row["nan"] = [difference(*pair) for pair in zip(*(jax.tree.map(clean, each(sick)) for each in compiled))]
    return row


def clean(x):
    """Without the steps of the document with a NaN, from row 0's first start to its second."""
    x = np.asarray(x)
    return np.delete(x.reshape(B * T, -1), slice(STARTS[0][1], STARTS[1][1]), axis=0) if x.shape[:2] == (B, T) else x


if __name__ == "__main__":
    for each in sys.argv[1:] or cases(T):
        print(json.dumps(measure(each)), flush=True)
