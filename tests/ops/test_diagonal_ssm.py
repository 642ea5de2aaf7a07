"""Every form of the diagonal state space model against float64 numpy and the goldens; the precision of its kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from seqmodels.ops.diagonal_ssm import diagonal_ssm, discretise, kernel
from tests import goldens
from tests.ops.forms import DEFAULT, assert_a_cut_changes_nothing, cotangents_for, marks
from tests.ops.judge import distance, relative_error
from tests.products import product, rest_in_tools
from tests.programs import fast_jit

FORMS = ("recurrent", "associative", "parallel", "chunked")
NAMES = ("u", "dA_minus_1", "dB", "C", "state")
# float32 against float64, relative to the largest value
TOLERANCE = 1e-5

every_form = pytest.mark.parametrize("form", FORMS)
default_form = pytest.mark.parametrize("form", rest_in_tools(FORMS, DEFAULT))  # the others are in `make test-tools`


def normal(rng, shape):
    return rng.standard_normal(shape) + 1j * rng.standard_normal(shape)


def system(rng, channels, modes, rule):
    """dA - 1 and dB in float64, of S4D-Lin with dt log-uniform in [1e-3, 1e-1]."""
    A = -0.5 + 1j * np.pi * np.arange(modes)
    dt = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), (channels, 1)))
    z = dt * A
    if rule == "zoh":
        return np.expm1(z), np.expm1(z) / A
    return z / (1 - z / 2), dt / (1 - z / 2)


def sample(*, steps, batch=2, channels=3, modes=4, rule="zoh", seed=0):
    rng = np.random.default_rng(seed)
    dA_minus_1, dB = system(rng, channels, modes, rule)
    inputs = {"dA_minus_1": dA_minus_1, "dB": dB, "C": normal(rng, (channels, modes))}
    inputs = {name: x.astype(np.complex64) for name, x in inputs.items()}
    inputs["u"] = rng.standard_normal((batch, steps, channels)).astype(np.float32)
    inputs["state"] = rng.standard_normal((batch, channels, 2 * modes)).astype(np.float32)
    return inputs


def judge(inputs, reset, cotangents):
    """y, the final state and gradients in JAX's convention, in double precision, one step after another."""
    u = inputs["u"].astype(np.float64)
    dA_minus_1, dB, C = (inputs[name].astype(np.complex128) for name in ("dA_minus_1", "dB", "C"))
    dA, modes = 1 + dA_minus_1, dA_minus_1.shape[1]
    dy, dfinal = (each.astype(np.float64) for each in cotangents)
    starts = np.zeros(u.shape[:2], bool) if reset is None else reset
    x = inputs["state"][..., :modes].astype(np.complex128) + 1j * inputs["state"][..., modes:]
    before, after = [], []
    for t in range(u.shape[1]):
        before.append(np.where(starts[:, t, None, None], 0, x))
        x = dA * before[t] + dB * u[:, t, :, None]
        after.append(x)
    y = np.stack([2 * (C * x).real.sum(-1) for x in after], axis=1)
    # g is dL/dRe + i dL/dIm of x, of which JAX returns the conjugate
    g = dfinal[..., :modes] + 1j * dfinal[..., modes:]
    gradients = {"u": np.zeros_like(u), "dA_minus_1": 0, "dB": 0, "C": 0}
    for t in reversed(range(u.shape[1])):
        g = g + 2 * C.conj() * dy[:, t, :, None]
        gradients["u"][:, t] = (dB.conj() * g).real.sum(-1)
        gradients["dB"] += (g.conj() * u[:, t, :, None]).sum(0)
        gradients["C"] += (2 * dy[:, t, :, None] * after[t]).sum(0)
        gradients["dA_minus_1"] += (g.conj() * before[t]).sum(0)
        g = np.where(starts[:, t, None, None], 0, dA.conj() * g)
    gradients["state"] = np.concatenate([g.real, g.imag], axis=-1)
    return y, np.concatenate([x.real, x.imag], axis=-1), gradients


def call(form, inputs, reset, chunk_size=16):
    return diagonal_ssm(**inputs, reset=reset, implementation=form, chunk_size=chunk_size)


@functools.cache
def evaluate(form):
    return fast_jit(functools.partial(call, form))


@functools.cache
def differentiate(form):
    """(inputs, reset, cotangents) -> ((y, state), gradients by input)."""

    def run(inputs, reset, cotangents):
        outputs, pull = jax.vjp(lambda inputs: call(form, inputs, reset), inputs)
        return outputs, pull(cotangents)[0]

    return fast_jit(run)


def errors(form, inputs, reset=None):
    cotangents = cotangents_for(inputs)
    (y, state), gradients = differentiate(form)(inputs, reset, cotangents)
    expected_y, expected_state, expected = judge(inputs, reset, cotangents)
    found = {name: distance(gradients[name], expected[name]) for name in inputs}
    return found | {"y": distance(y, expected_y), "final state": distance(state, expected_state)}


# ---- numbers


@pytest.mark.parametrize("form", goldens.golden_forms(*FORMS))
@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_goldens(form, rule):
    golden = goldens.load(f"s4d_{rule}").arrays
    names = ("u", "log_dt", "log_A_re", "A_im", "B_re", "B_im", "C_re", "C_im", "D", "h0_re", "h0_im")

    def run(p, from_zero=False):
        A = lax.complex(-jnp.exp(p["log_A_re"]), p["A_im"])
        B, C = lax.complex(p["B_re"], p["B_im"]), lax.complex(p["C_re"], p["C_im"])
        dA_minus_1, dB = discretise(A, B, jnp.exp(p["log_dt"]), rule)
        u = jnp.swapaxes(p["u"], 1, 2)
        state = None if from_zero else jnp.concatenate([p["h0_re"], p["h0_im"]], axis=-1)
        y, state = diagonal_ssm(u, dA_minus_1, dB, C, state=state, implementation=form, chunk_size=16)
        real, imaginary = jnp.split(state, 2, axis=-1)
        o = jnp.swapaxes(y + p["D"] * u, 1, 2)
        return {"o": o, "K": kernel(dA_minus_1, dB, C, u.shape[1]), "ht_re": real, "ht_im": imaginary}

    @fast_jit
    def run_and_pull(p, cotangents):
        outputs, pull = jax.vjp(run, p)
        return outputs, run(p, from_zero=True), pull(cotangents)[0]

    cotangents = {name: golden[f"cot_{name}"] for name in ("o", "K", "ht_re", "ht_im")}
    outputs, zero, gradients = run_and_pull({name: golden[name] for name in names}, cotangents)
    found = {name: relative_error(value, golden[name]) for name, value in outputs.items()}
    found |= {f"{name}_zero": relative_error(value, golden[f"{name}_zero"]) for name, value in zero.items()}
    found |= {name: relative_error(value, golden[f"grad_{name}"]) for name, value in gradients.items()}
    assert max(found.values()) < TOLERANCE, found


@product("form", FORMS, "rule", ["zoh", "bilinear"], always=DEFAULT)
def test_values_states_and_gradients(form, rule):
    found = errors(form, sample(steps=64, rule=rule))
    assert max(found.values()) < TOLERANCE, found


@product("form", FORMS, "steps", [1, 7, 16, 37], always=DEFAULT, rest_is_rare=True)
def test_any_length_with_documents(form, steps):
    inputs = sample(steps=steps)
    rows = [[t for t in row if t < steps] for row in ((5, 16, 17), (0, 30, 36))]
    found = errors(form, inputs, marks(inputs, *rows))
    assert max(found.values()) < TOLERANCE, found


@every_form
def test_closed_and_empty_modes(form):
    """dA = 0, dA = -1/2, and decays of -20 and -300 a step, whose dA - 1 is -1 to float32."""
    inputs = sample(steps=37)
    inputs["dA_minus_1"][0] = [-1.0, -1.5, np.expm1(-20.0), np.expm1(-300.0)]
    found = errors(form, inputs, marks(inputs, (5,)))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_the_kernel_keeps_its_digits_at_4096_steps(rule):
    """Up to 40 000 radians of phase; A and dt as float32 has them are exact, all else is float64 in the judge.

    The error is that of rounding z = dt A: |z| 6e-8 a step, until the mode has decayed. The naive float32 exp(l z) has
    the same, and powers of a float32 dA would be 20 times worse for slow modes (last assertion).
    """
    steps, channels, modes = 4096, 8, 32
    rng = np.random.default_rng(0)
    A = np.broadcast_to(-0.5 + 1j * np.pi * np.arange(modes), (channels, modes)).astype(np.complex64)
    dt = np.exp(np.linspace(np.log(1e-3), np.log(1e-1), channels)).astype(np.float32)
    C, B = normal(rng, (channels, modes)).astype(np.complex64), np.ones((channels, modes), np.complex64)
    z = dt[:, None].astype(np.float64) * A
    log_dA = z if rule == "zoh" else np.log1p(z / 2) - np.log1p(-z / 2)
    dB = np.expm1(z) / A if rule == "zoh" else dt[:, None] / (1 - z / 2)
    powers = np.exp(log_dA[..., None] * np.arange(steps))
    expected = 2 * np.einsum("dm,dml->dl", C * dB, powers).real
    found = fast_jit(lambda: kernel(*discretise(A, B, dt, rule), C, steps))()
    worst = np.abs(found - expected).max(axis=1) / np.abs(expected).max(axis=1)
    assert worst.max() < TOLERANCE, worst
    slow = 2 * (np.exp(z).astype(np.complex64).astype(np.complex128)[0, 0] ** np.arange(steps)).real
    assert np.abs(slow / 2 - np.exp(z[0, 0].real * np.arange(steps))).max() > 2e-5


# ---- time


@default_form
def test_carrying_the_state_over_a_cut_changes_nothing(form):
    inputs = sample(steps=37)
    assert_a_cut_changes_nothing(evaluate(form), inputs, ("u",), TOLERANCE)


@product("form", FORMS, "documents", [False, True], always=DEFAULT, rest_is_rare=True)
def test_causality(form, documents):
    """Exactly zero gradients to later inputs; to the rounding of an FFT where there is one."""
    inputs = sample(steps=37)
    reset = marks(inputs, (7,), ()) if documents else None
    cotangents = np.zeros_like(inputs["u"]), np.zeros_like(inputs["state"])
    cotangents[0][:, 20] = 1.0
    du = np.abs(differentiate(form)(inputs, reset, cotangents)[1]["u"])
    leak = 1e-6 * du.max() if form == "parallel" and not documents else 0.0
    assert du[:, 21:].max() <= leak
    assert du[:, 7:21].all()
    if documents:
        assert not du[0, :7].any() and du[1, :7].all()


ACCIDENTS = {
    "u": ("u", (0, 10, 2)),
    "u at a start": ("u", (0, 7, 2)),
    "u at an end": ("u", (0, 19, 2)),
    "last u": ("u", (0, 36, 2)),
    "state": ("state", (0, 2)),
}


@every_form
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_accident_stays_in_its_document_and_channel(form, value):
    inputs = sample(steps=37)
    reset = marks(inputs, (7, 20), (5,))
    documents = np.cumsum(reset, axis=1)
    cotangents = cotangents_for(inputs)
    (clean_y, clean_state), clean = differentiate(form)(inputs, reset, cotangents)
    for accident, (name, place) in ACCIDENTS.items():
        sick = inputs | {name: inputs[name].copy()}
        sick[name][place] = value
        (y, state), gradients = differentiate(form)(sick, reset, cotangents)
        step = place[1] if name == "u" else 0
        spoiled = np.zeros(clean_y.shape, bool)
        spoiled[0, step:, 2] = documents[0, step:] == documents[0, step]
        np.testing.assert_array_equal(np.isfinite(y), ~spoiled, err_msg=accident)
        np.testing.assert_array_equal(np.asarray(y)[~spoiled], np.asarray(clean_y)[~spoiled], err_msg=accident)
        healthy = np.ones(clean_state.shape, bool)
        healthy[0, 2] = documents[0, step] != documents[0, -1]
        np.testing.assert_array_equal(np.asarray(state)[healthy], np.asarray(clean_state)[healthy], err_msg=accident)
        for kept in ("u", "state"):
            np.testing.assert_array_equal(gradients[kept], clean[kept], err_msg=accident)
        for shared in ("dA_minus_1", "dB", "C"):
            np.testing.assert_array_equal(gradients[shared][:2], clean[shared][:2], err_msg=accident)


@every_form
def test_a_state_that_nothing_reads_reaches_no_gradient(form):
    inputs = sample(steps=37)
    reset = marks(inputs, (0,), (0, 9))
    cotangents = cotangents_for(inputs)
    clean = differentiate(form)(inputs, reset, cotangents)
    sick = differentiate(form)(inputs | {"state": np.full_like(inputs["state"], np.nan)}, reset, cotangents)
    jax.tree.map(np.testing.assert_array_equal, sick, clean)
    assert not np.asarray(clean[1]["state"]).any()


# ---- widths, memory, mistakes


@default_form
def test_narrow_inputs_are_summed_in_float32(form):
    inputs = sample(steps=37)
    narrow = jax.tree.map(jnp.asarray, inputs) | {"u": jnp.asarray(inputs["u"], jnp.bfloat16)}
    with jax.numpy_dtype_promotion("strict"):
        y, state = evaluate(form)(narrow, None)
        wide_y, wide_state = evaluate(form)(narrow | {"u": narrow["u"].astype(jnp.float32)}, None)
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    # Two programs, which the compiler may fuse unlike: equal but for float32 rounding, of which a bfloat16 sum is 2^16 times.
    np.testing.assert_allclose(y.astype(jnp.float32), wide_y.astype(jnp.bfloat16).astype(jnp.float32), rtol=2**-7)
    np.testing.assert_allclose(state, wide_state, rtol=1e-5)


@pytest.mark.parametrize("documents", [False, True])
def test_chunks_hold_states_at_their_starts_alone(documents):
    """The compiler's own count of temporary memory, forward and backward, beside that of T N states a channel."""
    inputs = sample(steps=128, batch=16, channels=8, modes=32)
    reset = marks(inputs, (100,)) if documents else None

    def temporary(form):
        def loss(inputs, reset):
            return jnp.sum(call(form, inputs, reset, chunk_size=32)[0])

        compiled = jax.jit(jax.grad(loss)).lower(inputs, reset).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    states = 4 * inputs["u"].size * 2 * inputs["C"].shape[1]
    assert temporary("recurrent") > states  # what a gradient holds when every step's state is kept
    assert temporary("chunked") < states / 2


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"u": np.zeros((2, 5, 4), np.float32)}, r"u \[2, 5, 4\]"),
        ({"dB": np.zeros((3, 5), np.complex64)}, "dB must be"),
        ({"state": np.zeros((2, 3, 4), np.float32)}, "state must be"),
        ({"reset": np.zeros((2, 4), bool)}, "reset must be"),
        ({"reset": np.zeros((2, 5), np.int32)}, "reset must be bool"),
        ({"implementation": "fft"}, "implementation='fft'"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_mistakes(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        diagonal_ssm(**(sample(steps=5) | change))


def test_what_does_not_exist_says_so():
    with pytest.raises(NotImplementedError, match="Pallas"):
        diagonal_ssm(**sample(steps=5), implementation="pallas")
    with pytest.raises(ValueError, match="rule='euler'"):
        discretise(np.zeros((1, 1), np.complex64), np.zeros((1, 1), np.complex64), np.ones(1, np.float32), "euler")
