"""What is no argument of an op is refused by name, alike by all ops: traced only, so that nothing is compiled."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import ops
from seqmodels.ops.lstm import LSTMState
from seqmodels.ops.mlstm_cell import MLSTMState
from seqmodels.ops.softmax_attention import init_cache

WIDTH = 4


def arguments(batch: int = 2, steps: int = 6) -> dict[str, dict]:
    """For every op all of its arrays, states and marks included."""

    def array(*shape, dtype=np.float32):
        return np.ones(shape, dtype)

    heads, K, E, N, M = 2, WIDTH, 6, 3, 2
    q, head, x = array(batch, steps, heads, K), array(batch, steps, heads), array(batch, steps, E)
    state, modes = array(batch, heads, K, K), array(E, M, dtype=np.complex64)
    qkv = {"q": q, "k": q, "v": q}
    found = {
        "causal_conv": {"x": x, "weight": array(4, E), "bias": array(E), "state": array(batch, 3, E)},
        "complex_gated_linear_attention": qkv | {"log_decay": -q, "angle": q, "state": array(batch, heads, 2 * K, K)},
        "delta_rule": qkv | {"beta": head, "log_decay": -q, "state": state},
        "diagonal_ssm": {"u": x, "dA_minus_1": -modes, "dB": modes, "C": modes, "state": array(batch, E, 2 * M)},
        "dplr_ssm": {"u": x, "A": -modes, "P": modes, "B": modes, "C": modes, "dt": array(E), "state": array(batch, E, 2 * M)},
        "gated_linear_attention": qkv | {"log_decay": -q, "value_log_decay": -q, "bonus": array(heads, K), "state": state},
        "linear_recurrence": {"a": x, "b": x, "state": array(batch, E)},
        "lstm": {"z": array(batch, steps, 4 * E), "kernel": array(E, 4 * E), "state": LSTMState(*[array(batch, E)] * 2)},
        "mlstm_cell": qkv
        | {"input_gate_logit": head, "forget_gate_logit": head}
        | {"state": MLSTMState(state, state[..., 0], state[..., 0, 0])},
        "selective_scan": {"x": x, "dt": x, "A": -array(E, N), "state": array(batch, E, N)}
        | {name: array(batch, steps, N) for name in ("B", "C")},
        "softmax_attention": qkv | {"cache": init_cache(batch, 8, heads, K, K)},
        "token_shift": {"x": x, "state": array(batch, E)},
    }
    found = {name: of_op | {"reset": array(batch, steps, dtype=bool)} for name, of_op in found.items()}
    return found | {
        "embedding": {"table": array(9, E), "tokens": array(batch, steps, dtype=np.int32)},
        "long_conv": {"x": x, "kernel": array(E, 5)},
        "rotary": {"x": q, "positions": array(batch, steps, dtype=np.int32), "frequencies": array(K // 2)},
    }


FIRST = {"a", "q", "table", "u", "x", "z"}  # what the first array of an op is called
OPS = [
    name
    for name in ops.__all__
    if callable(getattr(ops, name)) and FIRST & inspect.signature(getattr(ops, name)).parameters.keys()
]


def call(name: str, **changed):
    """Traces the op."""
    return jax.eval_shape(lambda arrays: getattr(ops, name)(**arrays), arguments()[name] | changed)


@pytest.mark.parametrize("name", OPS)
def test_numbers_of_another_kind_are_refused_by_name(name):
    """Integers would come back cut off to integers, and complex numbers without their imaginary part."""
    call(name)
    for argument, value in arguments()[name].items():
        kinds = {np.asarray(leaf).dtype.kind for leaf in jax.tree.leaves(value)}
        complex_too = "c" in kinds or name == "linear_recurrence"
        for dtype in {"b": [np.int32, np.float32], "i": [np.float32, bool]}.get("".join(kinds), [np.int32, bool, np.complex64]):
            if dtype is np.complex64 and complex_too:
                continue
            wrong = jax.tree.map(lambda leaf, dtype=dtype: np.ones(leaf.shape, dtype), value)
            with pytest.raises(ValueError, match=f"^{argument} must be .*; got {np.dtype(dtype)}"):
                call(name, **{argument: wrong})
    first = next(iter(arguments()[name]))
    with pytest.raises(ValueError, match=f"^{first} must be an array of .*; got a list"):
        getattr(ops, name)(**(arguments()[name] | {first: [1.0]}))


@pytest.mark.parametrize("name", OPS)
def test_narrow_states_numpys_numbers_and_empty_batches_are_taken(name):
    """A state in half precision becomes float32, as those of nothing read yet are."""
    narrow = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == np.float32 else leaf,
        {key: value for key, value in arguments()[name].items() if key == "state"},
    )
    call(name, **narrow)
    empty = jax.eval_shape(lambda arrays: getattr(ops, name)(**arrays), arguments(batch=0)[name])
    assert jax.tree.leaves(empty)[0].shape[0] == 0


@pytest.mark.parametrize("name", [name for name in OPS if name not in ("causal_conv", "embedding", "rotary")])
def test_a_sequence_has_a_step_and_all_its_axes(name):
    first, value = next(iter(arguments()[name].items()))
    for wrong in (arguments(steps=0)[name], {first: value[0]}, {first: value[..., 0]}):
        with pytest.raises(ValueError, match=r"\bT >= 1|at least one step|must|are not \[B,T"):
            call(name, **wrong)


def test_a_cache_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="a cache of 0 tokens holds none"):
        init_cache(2, 0, 2, 4, 4)
