"""Every form of the elementwise linear recurrence against float64 numpy: values, states, gradients, documents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqmodels.ops import target
from seqmodels.ops.linear_recurrence import linear_recurrence
from tests import goldens
from tests.ops.forms import DEFAULT, assert_a_cut_changes_nothing, marks
from tests.ops.judge import distance, relative_error
from tests.products import product, rest_in_tools
from tests.programs import fast_jit

FORMS = ("recurrent", "associative", "chunked")
# float32 against float64, relative to the largest value; measured 6e-7 or less at these lengths
TOLERANCE = 5e-6

every_form = pytest.mark.parametrize("form", FORMS)
default_form = pytest.mark.parametrize("form", rest_in_tools(FORMS, DEFAULT))  # the others are in `make test-tools`


def sample(*, steps, batch=2, channels=(5,), is_complex=False, low=-3.0, seed=0):
    """Inputs by name: decays of magnitude exp(uniform in [low, 0]), of either sign or any angle."""
    rng = np.random.default_rng(seed)
    shape = (batch, steps, *channels)
    turn = np.exp(1j * rng.uniform(0, 2 * np.pi, shape)) if is_complex else rng.choice([-1.0, 1.0], shape)
    inputs = {
        "a": np.exp(rng.uniform(low, 0, shape)) * turn,
        "b": normal(rng, shape, is_complex),
        "state": normal(rng, (batch, *channels), is_complex),
    }
    return {name: x.astype(np.complex64 if is_complex else np.float32) for name, x in inputs.items()}


def normal(rng, shape, is_complex=False):
    real = rng.standard_normal(shape)
    return real + 1j * rng.standard_normal(shape) if is_complex else real


def cotangents_for(inputs, seed=1):
    rng = np.random.default_rng(seed)
    likes = inputs["b"], inputs["state"]
    return tuple(normal(rng, x.shape, np.iscomplexobj(x)).astype(x.dtype) for x in likes)


def judge(inputs, reset=None, cotangents=None):
    """h, the final state and (with cotangents) the gradients, in double precision, one step after another."""
    double = np.complex128 if np.iscomplexobj(inputs["b"]) else np.float64
    a, b, h = (np.asarray(inputs[name]).astype(double) for name in ("a", "b", "state"))
    starts = np.zeros(a.shape[:2], bool) if reset is None else reset
    starts = starts.reshape(starts.shape + (1,) * (a.ndim - 2))
    before, after = np.zeros_like(b), np.zeros_like(b)
    for t in range(a.shape[1]):
        before[:, t] = np.where(starts[:, t], 0, h)
        h = after[:, t] = a[:, t] * before[:, t] + b[:, t]
    if cotangents is None:
        return after, h
    g, carry = np.zeros_like(b), cotangents[1].astype(b.dtype)
    for t in reversed(range(a.shape[1])):
        g[:, t] = cotangents[0][:, t] + carry
        carry = np.where(starts[:, t], 0, a[:, t] * g[:, t])
    return after, h, {"a": g * before, "b": g, "state": carry}


@functools.cache
def evaluate(form):
    return fast_jit(lambda inputs, reset: linear_recurrence(**inputs, reset=reset, implementation=form))


@functools.cache
def differentiate(form, backend="cpu"):
    """(inputs, reset, cotangents) -> ((h, state), gradients by input), with the schedule meant for `backend`."""

    def run(inputs, reset, cotangents):
        with target.compile_for(backend):
            outputs, pull = jax.vjp(lambda x: linear_recurrence(**x, reset=reset, implementation=form), inputs)
            return outputs, pull(cotangents)[0]

    return fast_jit(run)


def errors(form, inputs, reset=None, backend="cpu"):
    cotangents = cotangents_for(inputs)
    (h, state), gradients = differentiate(form, backend)(inputs, reset, cotangents)
    expected_h, expected_state, expected = judge(inputs, reset, cotangents)
    found = {name: distance(gradients[name], expected[name]) for name in inputs}
    return found | {"h": distance(h, expected_h), "final state": distance(state, expected_state)}


# ---- numbers


@pytest.mark.parametrize("form", goldens.golden_forms(*FORMS))
@pytest.mark.parametrize("name", ["diag_recurrence", "diag_recurrence_strong", "diag_recurrence_extreme"])
def test_goldens(form, name):
    golden = goldens.load(name).arrays

    def call(x, g, h0):
        return linear_recurrence(jnp.exp(g), x, state=h0, implementation=form)

    @fast_jit
    def run(x, g, h0, cotangents):
        found = dict(zip(("o_zero", "ht_zero"), call(x, g, None)))
        outputs, pull = jax.vjp(call, x, g, h0)
        return found | dict(zip(("o", "ht", "grad_x", "grad_g", "grad_h0"), (*outputs, *pull(cotangents))))

    found = run(golden["x"], golden["g"], golden["h0"], (golden["cot_o"], golden["cot_ht"]))
    found = {key: relative_error(value, golden[key]) for key, value in found.items()}
    assert max(found.values()) < 2e-6, found


@product("form", FORMS, "channels, is_complex", [((5,), False), ((5,), True), ((3, 2), False)], always=DEFAULT)
def test_values_states_and_gradients_with_documents(form, is_complex, channels):
    inputs = sample(steps=37, channels=channels, is_complex=is_complex)
    found = errors(form, inputs, marks(inputs, (5, 16, 17), (0, 30, 36)))
    assert max(found.values()) < TOLERANCE, found


@product("backend", ["cpu", "tpu"], "steps", [1, 2, 7, 16, 17, 63])
def test_any_length_in_the_blocks_of_any_device(backend, steps):
    inputs = sample(steps=steps, channels=())
    found = errors("chunked", inputs, marks(inputs, (steps // 2,), (0,)), backend)
    assert max(found.values()) < TOLERANCE, found


def test_one_associative_step_and_no_channel_axis():
    found = errors("associative", sample(steps=1, channels=()))
    assert max(found.values()) < TOLERANCE, found


DECAYS = {
    "weak": lambda rng, shape: np.exp(-rng.uniform(1e-3, 0.1, shape)),
    "to -5": lambda rng, shape: np.exp(-rng.uniform(0, 5, shape)),
    "-20": lambda rng, shape: np.full(shape, np.exp(-20.0)),
    "to -300": lambda rng, shape: np.exp(-np.exp(rng.uniform(np.log(1e-3), np.log(300), shape))),
    "one closed": lambda rng, shape: np.where(np.arange(shape[1])[None, :, None] == 43, 0.0, 0.99 * np.ones(shape)),
    "all closed": lambda rng, shape: np.zeros(shape),
    "all open": lambda rng, shape: np.ones(shape),
}


@default_form
def test_decays_of_any_strength(form):
    inputs = sample(steps=64)
    for strength, draw in DECAYS.items():
        inputs["a"] = draw(np.random.default_rng(3), inputs["a"].shape).astype(np.float32)
        found = errors(form, inputs)
        assert max(found.values()) < TOLERANCE, (strength, found)


@default_form
def test_a_closed_gate_forgets_like_a_reset(form):
    inputs = sample(steps=37)
    reset = marks(inputs, (5, 16), (30,))
    closed = inputs | {"a": np.where(reset[:, :, None], 0.0, inputs["a"]).astype(np.float32)}
    np.testing.assert_allclose(evaluate(form)(closed, None)[0], evaluate(form)(inputs, reset)[0], rtol=0, atol=1e-6)


# ---- time


@product("form", FORMS, "is_complex", [False, True], always=DEFAULT, rest_is_rare=True)
def test_carrying_the_state_over_a_cut_changes_nothing(form, is_complex):
    inputs = sample(steps=37, is_complex=is_complex)
    assert_a_cut_changes_nothing(evaluate(form), inputs, ("a", "b"), TOLERANCE)


@default_form
def test_packed_documents_are_separate_documents(form):
    inputs = sample(steps=37, batch=1)
    packed_h, packed_state = evaluate(form)(inputs, marks(inputs, (17,)))
    first, _ = evaluate(form)({"a": inputs["a"][:, :17], "b": inputs["b"][:, :17], "state": inputs["state"]}, None)
    second, state = evaluate(form)({"a": inputs["a"][:, 17:], "b": inputs["b"][:, 17:]}, None)
    assert distance(packed_h, np.concatenate([first, second], axis=1)) < TOLERANCE
    assert distance(packed_state, state) < TOLERANCE


@default_form
def test_gradients_to_later_inputs_are_exactly_zero(form):
    inputs = sample(steps=37)
    cotangents = np.zeros_like(inputs["b"]), np.zeros_like(inputs["state"])
    cotangents[0][:, 20] = 1.0
    gradients = differentiate(form)(inputs, None, cotangents)[1]
    for name in ("a", "b"):
        assert not np.asarray(gradients[name])[:, 21:].any()
        assert np.asarray(gradients[name])[:, 20].all()


ACCIDENTS = {
    "a": ("a", (0, 10, 2)),
    "a at a start": ("a", (0, 7, 2)),
    "a at an end": ("a", (0, 19, 2)),
    "b": ("b", (0, 10, 2)),
    "b at a start": ("b", (0, 7, 2)),
    "b at an end": ("b", (0, 19, 2)),
    "last b": ("b", (0, 36, 2)),
    "state": ("state", (0, 2)),
}


@product("form", FORMS, "is_complex", [False, True], always=DEFAULT, rest_is_rare=True)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_accident_stays_in_its_document_and_channel(form, value, is_complex):
    inputs = sample(steps=37, is_complex=is_complex)
    reset = marks(inputs, (7, 20), (5,))
    cotangents = cotangents_for(inputs)
    clean = differentiate(form)(inputs, reset, cotangents)
    for accident, (name, place) in ACCIDENTS.items():
        hurt = inputs | {name: inputs[name].copy()}
        hurt[name][place] = value
        with np.errstate(invalid="ignore", over="ignore"):
            judged_h, judged_state = judge(hurt, reset)
        (h, state), gradients = differentiate(form)(hurt, reset, cotangents)
        for found, judged, unhurt in ((h, judged_h, clean[0][0]), (state, judged_state, clean[0][1])):
            bad = ~np.isfinite(judged)
            np.testing.assert_array_equal(~np.isfinite(found), bad, err_msg=accident)
            np.testing.assert_array_equal(np.asarray(found)[~bad], np.asarray(unhurt)[~bad], err_msg=accident)
        ids = np.cumsum(reset, axis=1)
        elsewhere = np.ones(inputs["a"].shape, bool)
        elsewhere[0, ids[0] == (0 if name == "state" else ids[0, place[1]]), 2] = False
        for moved in ("a", "b"):
            found, unhurt = np.asarray(gradients[moved])[elsewhere], np.asarray(clean[1][moved])[elsewhere]
            np.testing.assert_array_equal(found, unhurt, err_msg=f"{accident}, d{moved}")


# ---- dtypes, transformations, cost


@default_form
def test_narrow_inputs_keep_a_float32_state(form):
    inputs = {name: jnp.asarray(x, jnp.bfloat16) if name != "state" else x for name, x in sample(steps=37).items()}
    cotangents = (jnp.asarray(cotangents_for(sample(steps=37))[0], jnp.bfloat16), np.ones_like(inputs["state"]))
    with jax.numpy_dtype_promotion("strict"):
        (h, state), gradients = differentiate(form)(inputs, None, cotangents)
    assert h.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    expected_h, expected_state, expected = judge(inputs, None, tuple(np.asarray(x, np.float64) for x in cotangents))
    assert relative_error(h, expected_h) < 4e-3  # rounding to 8 bits
    assert relative_error(state, expected_state) < TOLERANCE
    for name, gradient in gradients.items():
        assert gradient.dtype == inputs[name].dtype
        assert relative_error(gradient, expected[name]) < 4e-3


@default_form
def test_one_complex_input_makes_everything_complex(form):
    inputs = sample(steps=9) | {"a": sample(steps=9, is_complex=True)["a"]}
    h, state = evaluate(form)(inputs, None)
    assert h.dtype == state.dtype == jnp.complex64
    expected_h, _ = judge(inputs | {"b": inputs["b"] + 0j, "state": inputs["state"] + 0j})
    assert distance(h, expected_h) < TOLERANCE


@pytest.mark.tools
@pytest.mark.parametrize("form", ["chunked"])
def test_transformations_agree_with_the_plain_gradient(form):
    inputs = sample(steps=21)
    reset, cotangents = marks(inputs, (5,), ()), cotangents_for(inputs)
    plain = differentiate("chunked")(inputs, reset, cotangents)[1]

    def loss(inputs, reset, cotangents):
        h, state = linear_recurrence(**inputs, reset=reset, implementation=form)
        return jnp.sum(h * cotangents[0]) + jnp.sum(state * cotangents[1])

    mapped = fast_jit(jax.vmap(jax.grad(jax.checkpoint(loss))))(*jax.tree.map(lambda x: x[:, None], (inputs, reset, cotangents)))
    for name in inputs:
        assert relative_error(mapped[name][:, 0], plain[name]) < TOLERANCE

    def through_layers(form):
        def loss(b):
            def layer(b, _):
                return linear_recurrence(inputs["a"], b, reset=reset, implementation=form)[0], None

            return jnp.sum(jax.lax.scan(layer, b, None, length=3)[0] * cotangents[0])

        return fast_jit(jax.grad(loss))(inputs["b"])

    assert relative_error(through_layers(form), through_layers("recurrent")) < TOLERANCE


@pytest.mark.tools
def test_differentiating_twice():
    inputs = sample(steps=9, batch=1)

    def curvature(form):
        def norm(a):
            h, state = linear_recurrence(**(inputs | {"a": a}), implementation=form)
            return jnp.sum(h**2) + jnp.sum(state**3)

        return fast_jit(jax.grad(lambda a: jnp.sum(jax.grad(norm)(a) ** 2)))(inputs["a"])

    assert relative_error(curvature("chunked"), curvature("recurrent")) < TOLERANCE


def test_the_gradient_of_blocks_takes_a_quarter_of_the_memory_of_the_parallel_prefix():
    inputs = sample(steps=64, channels=(256,))

    def temporary_bytes(form):
        compiled = differentiate(form).lower(inputs, None, cotangents_for(inputs)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes("chunked") < temporary_bytes("associative") / 4


def test_one_step_by_default_is_the_recurrence_and_more_is_chunked():
    inputs = sample(steps=2)
    one = {name: x if name == "state" else x[:, :1] for name, x in inputs.items()}
    assert "custom_vjp" not in str(jax.make_jaxpr(lambda: linear_recurrence(**one))())
    assert "custom_vjp" in str(jax.make_jaxpr(lambda: linear_recurrence(**inputs))())


# ---- refusals


def test_what_does_not_exist_is_refused():
    inputs = sample(steps=3)
    with pytest.raises(NotImplementedError, match="cumulative products"):
        linear_recurrence(**inputs, implementation="parallel")
    with pytest.raises(NotImplementedError, match="Pallas"):
        linear_recurrence(**inputs, implementation="pallas")
    with pytest.raises(ValueError, match="'fused' is not one of recurrent"):
        linear_recurrence(**inputs, implementation="fused")


@pytest.mark.parametrize("name, shape", [("a", (2, 3, 1)), ("b", (2, 4, 5)), ("state", (2, 4)), ("reset", (2, 4))])
def test_shapes_that_do_not_fit_are_named(name, shape):
    wrong = np.zeros(shape, bool if name == "reset" else np.float32)
    with pytest.raises(ValueError) as raised:
        linear_recurrence(**(sample(steps=3) | {name: wrong}))
    assert name in str(raised.value) and str(list(shape)) in str(raised.value)


def test_no_steps_and_marks_that_are_not_bool_are_refused():
    with pytest.raises(ValueError, match="T >= 1"):
        linear_recurrence(np.zeros((2, 0, 3), np.float32), np.zeros((2, 0, 3), np.float32))
    with pytest.raises(ValueError, match="reset must be bool"):
        linear_recurrence(**sample(steps=3), reset=np.zeros((2, 3), np.int32))


SWEEP = {"steps": st.integers(1, 40), "is_complex": st.booleans(), "marked": st.booleans(), "seed": st.integers(0, 9)}


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(**SWEEP)
def test_a_sweep_of_lengths(steps, is_complex, marked, seed):
    inputs = sample(steps=steps, is_complex=is_complex, low=-20.0, seed=seed)
    reset = np.random.default_rng(seed).random((2, steps)) < 0.2 if marked else None
    for form in FORMS:
        found = errors(form, inputs, reset)
        assert max(found.values()) < 1e-5, (form, found)
