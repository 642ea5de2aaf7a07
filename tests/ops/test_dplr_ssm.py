"""The diagonal-plus-low-rank state space model against dense float64 numpy, the goldens, and itself in other forms."""

import functools

import jax
import numpy as np
import pytest

from seqmodels.ops import hippo
from seqmodels.ops.dplr_ssm import dplr_ssm, kernel
from tests import goldens
from tests.ops.forms import DEFAULT, cotangents_for, marks
from tests.ops.judge import relative_error
from tests.products import product
from tests.programs import fast_jit

FORMS = ("recurrent", "parallel", "chunked")
# float32 against float64, relative to the largest value
TOLERANCE = 1e-5

every_form = pytest.mark.parametrize("form", FORMS)


def sample(*, steps, batch=2, channels=3, modes=4, seed=0):
    """HiPPO-LegS with B, C and P moved a little, so that channels differ; complex numbers as [real, imaginary]."""
    rng = np.random.default_rng(seed)
    A, P, B = (np.tile(x, (channels, 1)) for x in hippo.normal_plus_low_rank_legs(2 * modes))
    normal = rng.standard_normal((3, 2, channels, modes))
    parts = {"A": A, "P": P + normal[0, 0] / 4, "B": B + normal[1, 0] / 4, "C": normal[2, 0] + 1j * normal[2, 1]}
    inputs = {name: np.stack([x.real, x.imag]).astype(np.float32) for name, x in parts.items()}
    inputs["dt"] = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), channels)).astype(np.float32)
    inputs["u"] = rng.standard_normal((batch, steps, channels)).astype(np.float32)
    inputs["state"] = rng.standard_normal((batch, channels, 2 * modes)).astype(np.float32)
    return inputs


def dense(inputs):
    """dA [D, N, N], dB [D, N] and C [D, N] over whole conjugate pairs, by a dense inverse."""
    A, P, B, C = (inputs[name][0].astype(np.float64) + 1j * inputs[name][1] for name in "APBC")
    A, P, B, C = (np.concatenate([x, x.conj()], axis=-1) for x in (A, P, B, C))
    eye = np.eye(A.shape[1])
    F = A[:, :, None] * eye - P[:, :, None] * P[:, None, :].conj()
    half = inputs["dt"].astype(np.float64)[:, None, None] / 2
    solve = np.linalg.inv(eye - half * F)
    return solve @ (eye + half * F), 2 * half[..., 0] * (solve @ B[..., None])[..., 0], C


def judge(inputs, reset=None):
    """y and the final state in double precision, one dense step after another."""
    dA, dB, C = dense(inputs)
    real, imaginary = np.split(inputs["state"].astype(np.float64), 2, axis=-1)
    x = np.concatenate([real + 1j * imaginary, real - 1j * imaginary], axis=-1)
    y = np.zeros(inputs["u"].shape)
    for t in range(y.shape[1]):
        if reset is not None:
            x = np.where(reset[:, t, None, None], 0, x)
        x = np.einsum("dnk,bdk->bdn", dA, x) + dB * inputs["u"][:, t, :, None].astype(np.float64)
        y[:, t] = (C * x).sum(-1).real
    half = x[..., : x.shape[-1] // 2]
    return y, np.concatenate([half.real, half.imag], axis=-1)


def call(form, inputs, reset, chunk_size=16):
    complexes = {name: jax.lax.complex(*inputs[name]) for name in "APBC"}
    rest = {name: inputs[name] for name in ("u", "dt", "state")}
    return dplr_ssm(**complexes, **rest, reset=reset, implementation=form, chunk_size=chunk_size)


@functools.cache
def differentiate(form):
    """(inputs, reset, cotangents) -> ((y, state), gradients by input)."""

    def run(inputs, reset, cotangents):
        outputs, pull = jax.vjp(lambda inputs: call(form, inputs, reset), inputs)
        return outputs, pull(cotangents)[0]

    return fast_jit(run)


@pytest.mark.parametrize("form", goldens.golden_forms(*FORMS))
def test_golden(form):
    golden = goldens.load("s4_dplr").arrays
    A = (golden["A_re"] + 1j * golden["A_im"]).astype(np.complex64)
    P, B, C = (golden[name][0].astype(np.complex64) for name in "PBC")
    dt = np.exp(golden["log_dt"]).astype(np.float32)
    u = np.swapaxes(golden["u"], 1, 2)

    @fast_jit
    def run(u):
        return kernel(A, P, B, C, dt, 64), dplr_ssm(u, A, P, B, C, dt, implementation=form, chunk_size=16)[0]

    K, o = run(u)
    assert relative_error(K, golden["K"]) < TOLERANCE
    assert relative_error(np.swapaxes(o, 1, 2), golden["o"]) < TOLERANCE


@product("form", FORMS, "documents", [False, True], always=DEFAULT)
def test_values_and_states_at_256_steps(form, documents):
    inputs = sample(steps=256, modes=32)
    reset = marks(inputs, (5, 100), (0, 64, 255)) if documents else None
    y, state = fast_jit(functools.partial(call, form))(inputs, reset)
    expected_y, expected_state = judge(inputs, reset)
    assert relative_error(y, expected_y) < TOLERANCE
    assert relative_error(state, expected_state) < TOLERANCE


@product("form", ["parallel", "chunked"], "documents", [False, True], always=DEFAULT)
def test_gradients_are_those_of_the_definition(form, documents):
    inputs = sample(steps=37)
    reset = marks(inputs, (5, 16), (0, 30)) if documents else None
    cotangents = cotangents_for(inputs)
    expected = differentiate("recurrent")(inputs, reset, cotangents)[1]
    found = differentiate(form)(inputs, reset, cotangents)[1]
    found = {name: relative_error(found[name], expected[name]) for name in inputs}
    assert max(found.values()) < TOLERANCE, found


def test_gradients_of_the_definition_in_double_precision():
    """Central differences of the dense float64 judge, along one random direction for each input."""
    inputs = sample(steps=19)
    cotangents = cotangents_for(inputs)
    gradients = differentiate("recurrent")(inputs, None, cotangents)[1]
    rng = np.random.default_rng(2)
    double = {name: x.astype(np.float64) for name, x in inputs.items()}
    for name, x in double.items():
        direction = rng.standard_normal(x.shape)
        slope = 0.0
        for sign in (1, -1):
            moved = judge(double | {name: x + sign * 1e-6 * direction})
            slope += sign * sum((c * out).sum() for c, out in zip(cotangents, moved)) / 2e-6
        found = (np.asarray(gradients[name], np.float64) * direction).sum()
        scale = np.linalg.norm(gradients[name]) * np.linalg.norm(direction)
        assert abs(found - slope) < 1e-5 * scale, name


@every_form
def test_causality_with_documents_is_exact(form):
    inputs = sample(steps=37)
    cotangents = np.zeros_like(inputs["u"]), np.zeros_like(inputs["state"])
    cotangents[0][:, 20] = 1.0
    du = np.asarray(differentiate(form)(inputs, marks(inputs, (7,)), cotangents)[1]["u"])
    assert not du[:, 21:].any() and du[:, 7:21].all() and not du[0, :7].any()


@every_form
def test_an_accident_stays_in_its_document_and_channel(form):
    inputs = sample(steps=37)
    reset = marks(inputs, (7, 20), (5,))
    cotangents = cotangents_for(inputs)
    (clean_y, clean_state), clean = differentiate(form)(inputs, reset, cotangents)
    for step in (7, 10, 19):
        u = inputs["u"].copy()
        u[0, step, 2] = np.nan
        (y, state), gradients = differentiate(form)(inputs | {"u": u}, reset, cotangents)
        spoiled = np.zeros(clean_y.shape, bool)
        spoiled[0, step:20, 2] = True
        np.testing.assert_array_equal(np.isfinite(y), ~spoiled)
        np.testing.assert_array_equal(np.asarray(y)[~spoiled], np.asarray(clean_y)[~spoiled])
        np.testing.assert_array_equal(state, clean_state)
        for kept in ("u", "state"):
            np.testing.assert_array_equal(gradients[kept], clean[kept])


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"P": np.zeros((2, 3, 5), np.float32)}, "P must be"),
        ({"dt": np.zeros((4,), np.float32)}, "dt must be"),
        ({"state": np.zeros((2, 3, 4), np.float32)}, "state must be"),
    ],
)
def test_mistakes(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        call("recurrent", sample(steps=5) | change, None)
    with pytest.raises(ValueError, match="implementation='fft'"):
        call("fft", sample(steps=5), None)


@pytest.mark.parametrize("form, reason", [("associative", "dense"), ("pallas", "Pallas")])
def test_what_does_not_exist_says_so(form, reason):
    with pytest.raises(NotImplementedError, match=reason):
        call(form, sample(steps=5), None)
