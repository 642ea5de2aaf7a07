"""The mLSTM cell against its authors' code and against float64 numpy, in every form."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.ops.mlstm_cell import MLSTMState, empty_mlstm_state, mlstm_cell
from tests import goldens
from tests.ops.forms import DEFAULT, marks
from tests.ops.judge import relative_error
from tests.products import product, rest_in_tools
from tests.programs import fast_jit

FORMS = ("recurrent", "associative", "parallel", "chunked")
CHUNK_SIZE = 16
INPUTS = ("q", "k", "v", "input_gate_logit", "forget_gate_logit")
every_form = pytest.mark.parametrize("form", FORMS)
default_form = pytest.mark.parametrize("form", rest_in_tools(FORMS, DEFAULT))  # the others are in `make test-tools`


# ---- the judge


def judge(inputs, reset=None, eps=1e-6):
    """h and the final state, one step after another, from the equations as they are written."""
    x = {name: np.asarray(value, np.float64) for name, value in inputs.items()}
    log_f = -np.logaddexp(0.0, -x["forget_gate_logit"])
    i, q, k, v = x["input_gate_logit"], x["q"], x["k"], x["v"]
    C, n, m = x["C"], x["n"], x["m"]
    h = np.zeros(v.shape)
    for t in range(q.shape[1]):
        if reset is not None:
            C, n, m = (np.where(reset[:, t].reshape(-1, *[1] * (y.ndim - 1)), 0.0, y) for y in (C, n, m))
        m_before, m = m, np.maximum(log_f[:, t] + m, i[:, t])
        decay, weight = np.exp(log_f[:, t] + m_before - m), np.exp(i[:, t] - m)
        C = decay[..., None, None] * C + weight[..., None, None] * k[:, t, :, :, None] * v[:, t, :, None, :]
        n = decay[..., None] * n + weight[..., None] * k[:, t]
        # exp(-m) is beyond float64 only where h is below it
        with np.errstate(over="ignore"):
            bound = np.maximum(np.abs(np.sum(q[:, t] * n, -1)), np.exp(-m)) + eps
        h[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], C) / bound[..., None]
    return h, MLSTMState(C, n, m)


def slope(inputs, cotangents, direction, reset=None, eps=1e-6, width=1e-6):
    """d/ds of <outputs and final state at inputs + s direction, cotangents>, by a central difference in float64."""

    def value(s):
        moved = {name: np.asarray(inputs[name], np.float64) + s * direction[name] for name in inputs}
        h, state = judge(moved, reset, eps)
        return sum(np.vdot(a, np.asarray(b, np.float64)) for a, b in zip((h, *state), cotangents))

    return (value(width) - value(-width)) / (2 * width)


def sample(steps=37, heads=2, K=8, V=12, spread=3.0, seed=0, batch=2):
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    return {
        "q": normal(batch, steps, heads, K),
        "k": normal(batch, steps, heads, K, scale=K**-0.5),
        "v": normal(batch, steps, heads, V),
        "input_gate_logit": normal(batch, steps, heads, scale=spread),
        "forget_gate_logit": normal(batch, steps, heads, scale=spread),
        "C": normal(batch, heads, K, V),
        "n": normal(batch, heads, K),
        "m": normal(batch, heads),
    }


def cotangents_for(inputs, seed=1):
    h, state = judge(inputs)
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(x.shape).astype(np.float32) for x in (h, *state))


# ---- the forms


def call(form, inputs, reset=None, eps=1e-6):
    state = MLSTMState(inputs["C"], inputs["n"], inputs["m"])
    chunk_size = CHUNK_SIZE if form == "chunked" else None
    arguments = [inputs[name] for name in INPUTS]
    return mlstm_cell(*arguments, state=state, reset=reset, implementation=form, chunk_size=chunk_size, eps=eps)


@functools.cache
def evaluate(form, eps=1e-6):
    return fast_jit(functools.partial(call, form, eps=eps))


def differentiate(form, eps=1e-6):
    """(inputs, reset, cotangents of h, C, n, m) -> ((h, state), gradients by input)."""
    return differentiated(form, eps)


@functools.cache
def differentiated(form, eps):

    def run(inputs, reset, cotangents):
        outputs, pull = jax.vjp(lambda inputs: call(form, inputs, reset, eps), inputs)
        return outputs, pull((cotangents[0], MLSTMState(*cotangents[1:])))[0]

    return fast_jit(run)


def worth(C, n, m):
    """The state without its gauge, relative to the largest exp(m): exp(m) itself may be beyond any float."""
    m = np.asarray(m, np.float64)
    scale = np.exp(m - m.max())
    return scale[..., None, None] * np.asarray(C, np.float64), scale[..., None] * np.asarray(n, np.float64), m


def state_error(state, expected):
    return max(relative_error(a, b) for a, b in zip(worth(*state), worth(*expected)))


def is_finite(tree):
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


# ---- numbers


@pytest.mark.parametrize("form", goldens.golden_forms(*FORMS))
@pytest.mark.parametrize("name", ["mlstm", "mlstm_strong"])
def test_goldens(form, name):
    """Values from a given and from the empty state, and gradients of the outputs. MANIFEST: k is divided by sqrt(K)."""
    golden = goldens.load(name).arrays
    theirs = ("q", "k", "v", "i", "f", "c0", "n0", "m0")

    @fast_jit
    def run(inputs, cotangent):
        def cell(q, k, v, i, f, *state):
            state = MLSTMState(*state) if state else None
            return mlstm_cell(q, k * k.shape[-1] ** -0.5, v, i, f, state=state, implementation=form)

        h, pull, state = jax.vjp(cell, *inputs, has_aux=True)
        return h, state, cell(*inputs[:5]), pull(cotangent)

    h, state, (h_zero, state_zero), gradients = run([golden[x] for x in theirs], golden["cot_o"])
    found = {"o": relative_error(h, golden["o"]), "o_zero": relative_error(h_zero, golden["o_zero"])}
    found["state"] = state_error(state, [golden[x] for x in ("cT", "nT", "mT")])
    found["state_zero"] = state_error(state_zero, [golden[x] for x in ("cT_zero", "nT_zero", "mT_zero")])
    found |= {x: relative_error(gradient, golden[f"grad_{x}"]) for x, gradient in zip(theirs, gradients)}
    assert max(found.values()) < 1e-5, found


@every_form
def test_values_and_states_with_documents(form):
    inputs = sample()
    reset = marks(inputs, (5, 16, 17), (0, 30, 36))
    h, state = evaluate(form)(inputs, reset)
    expected, expected_state = judge(inputs, reset)
    assert relative_error(h, expected) < 1e-5
    assert state_error(state, expected_state) < 1e-5


@product(
    "form",
    FORMS,
    "eps, documents",
    itertools.product([1e-6, 0.3], [False, True]),
    always=DEFAULT,
    rare=((1e-6, False), (0.3, True)),
)
def test_gradients_of_outputs_and_final_state(form, eps, documents):
    """Along random directions. With an eps that counts, h depends on m, and a gradient that ignores it is wrong."""
    inputs = sample()
    reset = marks(inputs, (5, 16, 17), (0, 30, 36)) if documents else None
    cotangents = cotangents_for(inputs)
    _, gradients = differentiate(form, eps)(inputs, reset, cotangents)
    rng = np.random.default_rng(2)
    for name in inputs:
        direction = {other: np.zeros(inputs[other].shape) for other in inputs}
        direction[name] = rng.standard_normal(inputs[name].shape)
        expected = slope(inputs, cotangents, direction, reset, eps)
        found = np.vdot(np.asarray(gradients[name], np.float64), direction[name])
        scale = np.linalg.norm(gradients[name])
        assert abs(found - expected) < 1e-5 * scale, (name, found, expected, scale)


def gates_at_300(case):
    """Inputs whose gates sit at +-300 and flip at random, or stay at one corner."""
    inputs = sample(spread=0.5, seed=5)
    rng = np.random.default_rng(6)
    for name, sign in zip(("input_gate_logit", "forget_gate_logit"), case):
        signs = rng.choice([-1.0, 1.0], inputs[name].shape) if sign == "?" else float(sign + "1")
        inputs[name] = (inputs[name] + 300.0 * signs).astype(np.float32)
    return inputs


@pytest.mark.tools
@every_form
def test_gates_at_300(form):
    """Finite and right, although exp(300) and exp(-m) are not; m is known to 2e-5 there, so that h is to 1e-4."""
    for case in ("--", "-+", "+-", "++", "??", "?-", "-?"):
        inputs = gates_at_300(case)
        cotangents = cotangents_for(inputs)
        (h, state), gradients = differentiate(form)(inputs, None, cotangents)
        expected, expected_state = judge(inputs)
        assert is_finite((h, state, gradients)), case
        assert np.abs(h - expected).max() <= 1e-4 * max(np.abs(expected).max(), 1e-30), case
        assert relative_error(state.m, expected_state.m) < 1e-6, case
        assert relative_error(state.C, expected_state.C) < 1e-4, case
        assert relative_error(state.n, expected_state.n) < 1e-4, case


def test_shut_gates_give_nothing():
    """Both gates at -300: nothing comes in, nothing stays; the first output is what is left of the state, e^-300."""
    inputs = gates_at_300("--")
    for form in FORMS:
        h, _ = evaluate(form)(inputs, None)
        assert np.abs(np.asarray(h)).max() == 0.0


@default_form
def test_the_stabiliser_is_a_gauge(form):
    """Without eps, a state (C, n, m) is as good as (C e^s, n e^s, m - s); and the outputs cannot tell."""
    inputs = sample()
    shift = np.float32(2.5)
    moved = inputs | {"C": inputs["C"] * np.exp(shift), "n": inputs["n"] * np.exp(shift), "m": inputs["m"] - shift}
    h, state = evaluate(form, 0.0)(inputs, None)
    h_moved, state_moved = evaluate(form, 0.0)(moved, None)
    assert relative_error(h_moved, h) < 1e-5
    assert max(relative_error(a, b) for a, b in zip(worth(*state_moved)[:2], worth(*state)[:2])) < 1e-5


@default_form
def test_split(form):
    inputs = sample()
    whole, end = evaluate(form)(inputs, None)
    pieces, state = [], {name: inputs[name] for name in ("C", "n", "m")}
    for piece in (slice(0, 1), slice(1, 17), slice(17, 37)):
        h, after = evaluate(form)({name: inputs[name][:, piece] for name in INPUTS} | state, None)
        pieces.append(h)
        state = after._asdict()
    assert relative_error(np.concatenate(pieces, axis=1), whole) < 1e-5
    assert state_error(after, end) < 1e-5


@every_form
@pytest.mark.parametrize("poisoned", [*INPUTS, "state"])
def test_a_nan_stays_in_its_document(form, poisoned):
    """Row 0: documents at 5 and 16, the NaN at step 8; row 1 and the other documents are as if it were a number."""
    inputs = sample(spread=1.0)
    reset = marks(inputs, (5, 16), (3,))
    cotangents = cotangents_for(inputs)
    (clean, _), _ = differentiate(form)(inputs, reset, cotangents)
    bad = {name: value.copy() for name, value in inputs.items()}
    if poisoned == "state":
        for name in ("C", "n", "m"):
            bad[name][0] = np.nan
        document = np.s_[0, :5]
    else:
        bad[poisoned][0, 8] = np.nan
        document = np.s_[0, 5:16]
    elsewhere = np.ones(reset.shape, bool)
    elsewhere[document] = False
    (h, state), gradients = differentiate(form)(bad, reset, cotangents)
    assert np.isnan(h[document]).any() and is_finite(state)
    assert relative_error(np.asarray(h)[elsewhere], np.asarray(clean)[elsewhere]) < 1e-6
    assert all(np.isfinite(np.asarray(gradients[name])[elsewhere]).all() for name in INPUTS)


@default_form
def test_bfloat16(form):
    """Outputs in the dtype of v; gates, state and the division in float32."""
    inputs = sample(spread=1.0)
    narrow = {x: jnp.asarray(y, jnp.bfloat16) if x in INPUTS else y for x, y in inputs.items()}
    h, state = evaluate(form)(narrow, None)
    expected, expected_state = judge(narrow)
    assert h.dtype == jnp.bfloat16 and all(leaf.dtype == jnp.float32 for leaf in state)
    assert relative_error(h, expected) < 2**-8
    assert state_error(state, expected_state) < 1e-5


def test_the_empty_state_is_the_default():
    inputs = sample(steps=7)
    state = empty_mlstm_state(2, 2, 8, 12)
    arguments = [inputs[name] for name in INPUTS]
    given, omitted = fast_jit(lambda *x: (mlstm_cell(*x, state=state), mlstm_cell(*x)))(*arguments)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(omitted)))


def test_mistakes():
    inputs = sample(steps=3)
    arguments = [inputs[name] for name in INPUTS]
    with pytest.raises(NotImplementedError, match="no Pallas kernel"):
        mlstm_cell(*arguments, implementation="pallas")
    with pytest.raises(ValueError, match="implementation='fast' is not one of"):
        mlstm_cell(*arguments, implementation="fast")
    with pytest.raises(ValueError, match="chunk_size=0"):
        mlstm_cell(*arguments, chunk_size=0)
    with pytest.raises(ValueError, match=r"input_gate_logit must be \[2, 3, 2\]"):
        mlstm_cell(*arguments[:3], inputs["input_gate_logit"][..., None], arguments[4])
    with pytest.raises(ValueError, match=r"state.m must be \[2, 2\]"):
        mlstm_cell(*arguments, state=empty_mlstm_state(2, 2, 8, 12)._replace(m=np.zeros(2, np.float32)))
    with pytest.raises(ValueError, match="reset must be bool"):
        mlstm_cell(*arguments, reset=np.zeros((2, 3), np.int32))
    with pytest.raises(ValueError, match="q and k must both be"):
        mlstm_cell(inputs["q"][:, :0], *arguments[1:])
