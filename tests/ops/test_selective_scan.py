"""Every form of Mamba's selective scan against float64 numpy: values, states, gradients, documents, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqmodels.ops.selective_scan import selective_scan
from tests import goldens
from tests.ops.forms import DEFAULT, assert_a_cut_changes_nothing, cotangents_for, marks
from tests.ops.judge import relative_error
from tests.products import rest_in_tools
from tests.programs import fast_jit

FORMS = ("recurrent", "associative", "chunked")
CHUNK_SIZE = 8
# float32 against float64, relative to the largest value; measured 1e-6 or less at these lengths
TOLERANCE = 5e-6

every_form = pytest.mark.parametrize("form", FORMS)
default_form = pytest.mark.parametrize("form", rest_in_tools(FORMS, DEFAULT))  # the others are in `make test-tools`


def sample(*, steps, batch=2, channels=4, states=3, most=2.0, seed=0):
    """Inputs by name; A to -3, step sizes log-uniform from 1e-3 to `most`."""
    rng = np.random.default_rng(seed)
    inputs = {
        "x": rng.standard_normal((batch, steps, channels)),
        "dt": np.exp(rng.uniform(np.log(1e-3), np.log(most), (batch, steps, channels))),
        "A": -np.exp(rng.uniform(np.log(0.1), np.log(3.0), (channels, states))),
        "B": rng.standard_normal((batch, steps, states)),
        "C": rng.standard_normal((batch, steps, states)),
        "state": rng.standard_normal((batch, channels, states)),
    }
    return {name: x.astype(np.float32) for name, x in inputs.items()}


def part(inputs, steps):
    return {name: x if name in ("A", "state") else x[:, steps] for name, x in inputs.items()}


def judge(inputs, reset=None, cotangents=None):
    """y, the final state and (with cotangents) the gradients, in float64, one step after another."""
    x, dt, A, B, C, h = (np.asarray(inputs[name]).astype(np.float64) for name in ("x", "dt", "A", "B", "C", "state"))
    starts = np.zeros(x.shape[:2], bool) if reset is None else reset
    starts = starts[:, :, None, None]
    decay, y, before, after = np.exp(dt[..., None] * A), np.zeros_like(x), [], []
    for t in range(x.shape[1]):
        before.append(np.where(starts[:, t], 0.0, h))
        h = decay[:, t] * before[-1] + (dt * x)[:, t, :, None] * B[:, t, None, :]
        after.append(h)
        y[:, t] = np.einsum("ben,bn->be", h, C[:, t])
    if cotangents is None:
        return y, h
    dy, dh = (np.asarray(d, np.float64) for d in cotangents)
    d = {name: np.zeros(inputs[name].shape) for name in inputs}
    for t in reversed(range(x.shape[1])):
        g = dh + dy[:, t, :, None] * C[:, t, None, :]
        w = g * decay[:, t] * before[t]
        written = np.einsum("ben,bn->be", g, B[:, t])
        d["x"][:, t] = dt[:, t] * written
        d["dt"][:, t] = np.einsum("ben,en->be", w, A) + x[:, t] * written
        d["A"] += np.einsum("ben,be->en", w, dt[:, t])
        d["B"][:, t] = np.einsum("ben,be->bn", g, dt[:, t] * x[:, t])
        d["C"][:, t] = np.einsum("ben,be->bn", after[t], dy[:, t])
        dh = np.where(starts[:, t], 0.0, g * decay[:, t])
    return y, h, d | {"state": dh}


def call(form, inputs, reset=None, chunk_size=CHUNK_SIZE):
    options = {} if form == "pallas" else {"chunk_size": chunk_size}  # the kernels have none to choose
    return selective_scan(**inputs, reset=reset, implementation=form, **options)


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
    found = {name: relative_error(gradients[name], expected[name]) for name in inputs}
    return found | {"y": relative_error(y, expected_y), "final state": relative_error(state, expected_state)}


# ---- numbers


@pytest.mark.parametrize("form", goldens.golden_forms(*FORMS))
@pytest.mark.parametrize("name", ["mamba1", "mamba1_strong"])
def test_goldens(form, name):
    golden = goldens.load(name).arrays
    names = ("u", "dt", "A_log", "Bm", "C", "D", "z", "dt_bias", "h0")

    def mamba(u, dt, A_log, Bm, C, D, z, dt_bias, h0):
        dt = jax.nn.softplus(dt + dt_bias)
        y, state = selective_scan(u, dt, -jnp.exp(A_log), Bm, C, state=h0, implementation=form)
        return (y + D * u) * jax.nn.silu(z), state

    @fast_jit
    def run(inputs, cotangents):
        found = dict(zip(("o_zero", "ht_zero"), mamba(*inputs[:-1], None)))
        outputs, pull = jax.vjp(mamba, *inputs)
        gradients = zip((f"grad_{name}" for name in names), pull(cotangents))
        return found | dict(zip(("o", "ht"), outputs)) | dict(gradients)

    found = run([golden[name] for name in names], (golden["cot_o"], golden["cot_ht"]))
    found = {key: relative_error(value, golden[key]) for key, value in found.items()}
    assert max(found.values()) < TOLERANCE, found


@every_form
def test_values_states_and_gradients_with_documents(form):
    inputs = sample(steps=37)
    found = errors(form, inputs, marks(inputs, (5, 16, 17), (0, 30, 36)))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("steps, chunk_size", [(1, 8), (7, 8), (8, 8), (9, 8), (17, 1), (17, 40), (33, 16), (63, 5)])
def test_any_length_and_any_chunk_size(steps, chunk_size):
    inputs = sample(steps=steps, channels=3, states=2)
    reset = marks(inputs, (steps // 2,), (0,))
    cotangents = cotangents_for(inputs)

    @fast_jit
    def run(inputs, reset, cotangents):
        outputs, pull = jax.vjp(lambda inputs: call("chunked", inputs, reset, chunk_size), inputs)
        return *outputs, pull(cotangents)[0]

    y, state, gradients = run(inputs, reset, cotangents)
    expected_y, expected_state, expected = judge(inputs, reset, cotangents)
    assert relative_error(y, expected_y) < TOLERANCE
    assert relative_error(state, expected_state) < TOLERANCE
    for name in inputs:
        assert relative_error(gradients[name], expected[name]) < TOLERANCE, name


# The product dt * A of every step.
EXPONENTS = {
    "weak": lambda rng, shape: -rng.uniform(1e-3, 0.1, shape),
    "to -5": lambda rng, shape: -rng.uniform(1e-2, 5, shape),
    "-20": lambda rng, shape: np.full(shape, -20.0),
    "to -300": lambda rng, shape: -np.exp(rng.uniform(np.log(1e-3), np.log(300), shape)),
    "one closed gate": lambda rng, shape: np.where(np.arange(shape[1])[:, None] == 43, -1e9, np.full(shape, -0.01)),
    "0": lambda rng, shape: np.zeros(shape),
}


@default_form
def test_decays_of_any_strength(form):
    inputs = sample(steps=64, batch=1)
    inputs["A"] = np.full_like(inputs["A"], -1.0) * np.linspace(0.5, 1.0, 3, dtype=np.float32)
    for strength, draw in EXPONENTS.items():
        inputs["dt"] = -draw(np.random.default_rng(3), inputs["dt"].shape).astype(np.float32)
        found = errors(form, inputs)
        assert max(found.values()) < 1e-5, (strength, found)


# ---- time


@default_form
def test_carrying_the_state_over_a_cut_changes_nothing(form):
    inputs = sample(steps=37)
    assert_a_cut_changes_nothing(evaluate(form), inputs, ("x", "dt", "B", "C"), TOLERANCE)


@default_form
def test_packed_documents_are_separate_documents(form):
    inputs = sample(steps=37, batch=1)
    packed_y, packed_state = evaluate(form)(inputs, marks(inputs, (17,)))
    first, _ = evaluate(form)(part(inputs, slice(0, 17)), None)
    second, state = evaluate(form)(part(inputs, slice(17, 37)) | {"state": None}, None)
    assert relative_error(packed_y, np.concatenate([first, second], axis=1)) < TOLERANCE
    assert relative_error(packed_state, state) < TOLERANCE


@every_form
def test_gradients_to_later_inputs_are_exactly_zero(form):
    inputs = sample(steps=37)
    cotangents = np.zeros_like(inputs["x"]), np.zeros_like(inputs["state"])
    cotangents[0][:, 20] = 1.0
    gradients = differentiate(form)(inputs, marks(inputs, (5, 16, 17), (0, 30, 36)), cotangents)[1]
    for name in ("x", "dt", "B", "C"):
        assert not np.asarray(gradients[name])[:, 21:].any()
        assert np.asarray(gradients[name])[:, 20].all()


ACCIDENTS = {
    "x": ("x", (0, 10, 2)),
    "x at a start": ("x", (0, 7, 2)),
    "x at an end": ("x", (0, 19, 2)),
    "dt": ("dt", (0, 10, 2)),
    "dt at a start": ("dt", (0, 7, 2)),
    "B": ("B", (0, 10, 1)),
    "C": ("C", (0, 10, 1)),
    "C at a start": ("C", (0, 7, 1)),
    "state": ("state", (0, 2, 1)),
    "last x": ("x", (0, 36, 2)),
}


@every_form
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_accident_stays_in_its_document(form, value):
    inputs = sample(steps=37)
    reset = marks(inputs, (7, 20), (5,))
    ids = np.cumsum(reset, axis=1)
    cotangents = cotangents_for(inputs)
    clean = differentiate(form)(inputs, reset, cotangents)
    for accident, (name, place) in ACCIDENTS.items():
        hurt = inputs | {name: inputs[name].copy()}
        hurt[name][place] = value
        with np.errstate(invalid="ignore", over="ignore"):
            judged_y, judged_state = judge(hurt, reset)
        (y, state), gradients = differentiate(form)(hurt, reset, cotangents)
        for found, judged, unhurt in ((y, judged_y, clean[0][0]), (state, judged_state, clean[0][1])):
            bad = ~np.isfinite(judged)
            np.testing.assert_array_equal(~np.isfinite(found), bad, err_msg=accident)
            np.testing.assert_array_equal(np.asarray(found)[~bad], np.asarray(unhurt)[~bad], err_msg=accident)
        elsewhere = np.ones(ids.shape, bool)
        elsewhere[0] = ids[0] != (0 if name == "state" else ids[0, place[1]])
        for moved in ("x", "dt", "B", "C"):
            found, unhurt = np.asarray(gradients[moved])[elsewhere], np.asarray(clean[1][moved])[elsewhere]
            np.testing.assert_array_equal(found, unhurt, err_msg=f"{accident}, d{moved}")
        if name != "state":
            assert np.isfinite(gradients["state"]).all(), accident


# ---- dtypes, transformations, cost


@default_form
def test_narrow_inputs_keep_a_float32_state(form):
    inputs = {name: x if name in ("A", "state") else jnp.asarray(x, jnp.bfloat16) for name, x in sample(steps=37).items()}
    cotangents = cotangents_for(inputs)
    cotangents = jnp.asarray(cotangents[0], jnp.bfloat16), cotangents[1]
    with jax.numpy_dtype_promotion("strict"):
        (y, state), gradients = differentiate(form)(inputs, None, cotangents)
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    expected_y, expected_state, expected = judge(inputs, None, cotangents)
    assert relative_error(y, expected_y) < 4e-3  # rounding to 8 bits
    assert relative_error(state, expected_state) < TOLERANCE
    for name, gradient in gradients.items():
        assert gradient.dtype == inputs[name].dtype
        assert relative_error(gradient, expected[name]) < (4e-3 if gradient.dtype == jnp.bfloat16 else TOLERANCE), name


@pytest.mark.tools
@pytest.mark.parametrize("form", ["chunked"])
def test_transformations_agree_with_the_plain_gradient(form):
    inputs = sample(steps=21)
    reset, cotangents = marks(inputs, (5,), ()), cotangents_for(inputs)
    plain = differentiate("chunked")(inputs, reset, cotangents)[1]

    def loss(inputs, reset, cotangents):
        y, state = call(form, inputs, reset)
        return jnp.sum(y * cotangents[0]) + jnp.sum(state * cotangents[1])

    axes = {name: None if name == "A" else 0 for name in inputs}
    by_row = {name: x if name == "A" else x[:, None] for name, x in inputs.items()}
    mapped = fast_jit(jax.vmap(jax.grad(jax.checkpoint(loss)), in_axes=(axes, 0, 0)))(
        by_row, reset[:, None], tuple(x[:, None] for x in cotangents)
    )
    for name in inputs:
        of_rows = mapped[name].sum(0) if name == "A" else mapped[name][:, 0]
        assert relative_error(of_rows, plain[name]) < TOLERANCE, name

    def through_layers(form):
        def loss(x):
            def layer(x, _):
                return call(form, inputs | {"x": x}, reset)[0], None

            return jnp.sum(jax.lax.scan(layer, x, None, length=3)[0] * cotangents[0])

        return fast_jit(jax.grad(loss))(inputs["x"])

    assert relative_error(through_layers(form), through_layers("recurrent")) < TOLERANCE


@pytest.mark.tools
def test_differentiating_twice():
    inputs = sample(steps=9, batch=1)

    def curvature(form):
        def norm(dt):
            y, state = call(form, inputs | {"dt": dt}, chunk_size=4)
            return jnp.sum(y**2) + jnp.sum(state**3)

        return fast_jit(jax.grad(lambda dt: jnp.sum(jax.grad(norm)(dt) ** 2)))(inputs["dt"])

    assert relative_error(curvature("chunked"), curvature("recurrent")) < TOLERANCE


def test_chunks_never_hold_the_states_of_all_steps():
    def temporary_bytes(form, steps):
        """Of the gradient, in units of all states of all steps."""
        inputs = sample(steps=steps, channels=64, states=16)
        compiled = differentiate(form).lower(inputs, None, cotangents_for(inputs)).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * inputs["x"].size * 16)

    assert temporary_bytes("chunked", 256) < 0.25  # of which the states at chunk starts are 1 / CHUNK_SIZE
    assert temporary_bytes("chunked", 64) < temporary_bytes("associative", 64) / 20
    inputs = sample(steps=256, channels=64, states=16)
    forward = evaluate("chunked").lower(inputs, None).compile().memory_analysis()
    assert forward.temp_size_in_bytes < 0.02 * 4 * inputs["x"].size * 16


def test_a_gradient_of_the_last_state_leaves_out_what_outputs_need():
    """As in the first of two passes where time is split. Beside it, the gradient of a sum in which outputs weigh nothing."""
    inputs = sample(steps=16)

    def loss(inputs, weight=None):
        y, state = call("chunked", inputs)
        return jnp.sum(jnp.sin(state)) + (0.0 if weight is None else weight * jnp.sum(y))

    alone, beside = (fast_jit(jax.grad(loss)).lower(inputs, *weight).compile() for weight in ((), (np.float32(0),)))
    for name, gradient in alone(inputs).items():
        np.testing.assert_array_equal(gradient, beside(inputs, np.float32(0))[name], err_msg=name)
    assert alone.cost_analysis()["flops"] < 0.8 * beside.cost_analysis()["flops"]


def test_float32_inputs_get_float32_products_on_every_device():
    inputs = sample(steps=9)
    for form in FORMS:
        text = str(differentiate(form).trace(inputs, None, cotangents_for(inputs)).jaxpr)
        products = text.count("dot_general[")
        assert products > 0 and text.count("Precision.HIGHEST, Precision.HIGHEST") == products, form


def test_one_step_by_default_is_the_recurrence_and_more_is_chunked():
    inputs = sample(steps=2)
    assert "custom_vjp" not in str(jax.make_jaxpr(lambda: selective_scan(**part(inputs, slice(0, 1))))())
    assert "custom_vjp" in str(jax.make_jaxpr(lambda: selective_scan(**inputs))())


# ---- refusals


def test_what_does_not_exist_is_refused():
    inputs = sample(steps=3)
    with pytest.raises(NotImplementedError, match="full rank"):
        selective_scan(**inputs, implementation="parallel")
    with pytest.raises(NotImplementedError, match="Pallas"):
        selective_scan(**inputs, implementation="pallas")
    with pytest.raises(ValueError, match="'fused' is not one of recurrent"):
        selective_scan(**inputs, implementation="fused")
    with pytest.raises(ValueError, match="chunk_size=0"):
        selective_scan(**inputs, chunk_size=0)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("x", (2, 3)),
        ("x", (2, 0, 4)),
        ("dt", (2, 3, 1)),
        ("A", (3, 4)),
        ("B", (2, 3, 4)),
        ("C", (2, 4, 3)),
        ("state", (2, 3, 4)),
        ("reset", (2, 4)),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, shape):
    wrong = np.zeros(shape, bool if name == "reset" else np.float32)
    with pytest.raises(ValueError) as raised:
        selective_scan(**(sample(steps=3) | {name: wrong}))
    assert name in str(raised.value) and str(list(shape)) in str(raised.value)


def test_marks_that_are_not_bool_are_refused():
    with pytest.raises(ValueError, match="reset must be bool"):
        selective_scan(**sample(steps=3), reset=np.zeros((2, 3), np.int32))


SWEEP = {
    "steps": st.integers(1, 40),
    "chunk_size": st.integers(1, 12),
    "channels": st.integers(1, 5),
    "states": st.integers(1, 5),
    "marked": st.booleans(),
    "seed": st.integers(0, 9),
}


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(**SWEEP)
def test_a_sweep_of_shapes(steps, chunk_size, channels, states, marked, seed):
    inputs = sample(steps=steps, channels=channels, states=states, most=10.0, seed=seed)
    reset = np.random.default_rng(seed).random((2, steps)) < 0.2 if marked else None
    cotangents = cotangents_for(inputs)
    outputs, pull = jax.vjp(lambda inputs: call("chunked", inputs, reset, chunk_size), inputs)
    expected_y, expected_state, expected = judge(inputs, reset, cotangents)
    gradients = pull(cotangents)[0]
    found = {name: relative_error(gradients[name], expected[name]) for name in inputs}
    found |= {"y": relative_error(outputs[0], expected_y), "state": relative_error(outputs[1], expected_state)}
    assert max(found.values()) < 1e-5, found
