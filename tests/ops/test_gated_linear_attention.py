"""Every form of gated linear attention against float64 numpy: values, states, gradients, at awkward sizes and decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqmodels.ops import gated_linear_attention
from tests.ops.forms import (
    DEFAULT,
    FORMS,
    assert_a_cut_changes_nothing,
    call,
    cotangents_for,
    differentiate,
    evaluate,
    marks,
    traced_for,
)
from tests.ops.judge import gradients, relative_error, run
from tests.products import product, rest_in_tools
from tests.programs import fast_jit

# float32 against float64, relative to the largest value; measured 4e-7 or less at these lengths
TOLERANCE = 5e-6

every_form = pytest.mark.parametrize("form", FORMS)
default_form = pytest.mark.parametrize("form", rest_in_tools(FORMS, DEFAULT))  # the others are in `make test-tools`


def sample(
    *, steps, heads=2, groups=None, batch=2, channels=8, width=6, decay=None, low=-5.0, value_decay=False, bonus=False, seed=0
):
    """Inputs by name; `decay` is None, "head" or "channel", uniform in [low, 0]."""
    rng = np.random.default_rng(seed)
    groups = groups or heads
    inputs = {
        "q": rng.standard_normal((batch, steps, groups, channels)),
        "k": rng.standard_normal((batch, steps, groups, channels)),
        "v": rng.standard_normal((batch, steps, heads, width)),
        "state": rng.standard_normal((batch, heads, channels, width)),
    }
    if decay:
        inputs["log_decay"] = rng.uniform(low, 0, (batch, steps, heads, channels if decay == "channel" else 1))
    if value_decay:
        inputs["value_log_decay"] = rng.uniform(low, 0, (batch, steps, heads, width))
    if bonus:
        inputs["bonus"] = rng.standard_normal((heads, channels))
    return {name: value.astype(np.float32) for name, value in inputs.items()}


def errors(form, inputs, reset=None):
    """Relative error of the outputs, the final state and every gradient."""
    cotangents = cotangents_for(inputs)
    (o, state), grads = differentiate(form)(inputs, reset, cotangents)
    expected_o, expected_state, tape = run(inputs, reset)
    expected = gradients(tape, *cotangents)
    found = {name: relative_error(grads[name], expected[name]) for name in inputs}
    return {"o": relative_error(o, expected_o), "final state": relative_error(state, expected_state), **found}


SIGNATURES = {
    "no decay": {},
    "per head": {"decay": "head"},
    "per channel": {"decay": "channel"},
    "per channel, bonus": {"decay": "channel", "bonus": True},
    "no decay, bonus, groups": {"bonus": True, "heads": 4, "groups": 2},
    "per head, groups": {"decay": "head", "heads": 4, "groups": 2},
    "per channel, one group": {"decay": "channel", "heads": 3, "groups": 1},
    "both sides": {"decay": "channel", "value_decay": True},
    "value side, bonus": {"value_decay": True, "bonus": True},
}


@product("form", FORMS, "signature", SIGNATURES, always=DEFAULT)
def test_values_states_and_gradients_with_documents(form, signature):
    inputs = sample(steps=37, **SIGNATURES[signature])
    reset = marks(inputs, (5, 16, 17), (0, 30, 36))
    found = errors(form, inputs, reset)
    assert max(found.values()) < TOLERANCE, found


@product("form", ["chunked", "chunked_together"], "signature", ["no decay", "per channel, bonus", "both sides"])
def test_values_states_and_gradients_without_documents(form, signature):
    found = errors(form, sample(steps=37, **SIGNATURES[signature]))
    assert max(found.values()) < TOLERANCE, found


DECAYS = {
    "weak": lambda rng, shape: -rng.uniform(1e-3, 0.1, shape),
    "to -5": lambda rng, shape: -rng.uniform(1e-2, 5, shape),
    "-20": lambda rng, shape: np.full(shape, -20.0),
    "to -300": lambda rng, shape: -np.exp(rng.uniform(np.log(1e-3), np.log(300), shape)),
    "one closed gate": lambda rng, shape: (
        np.where(np.arange(shape[1])[None, :, None, None] == 43, -200.0, -0.01) * np.ones(shape)
    ),
    "one shut gate": lambda rng, shape: np.where(np.arange(shape[1])[None, :, None, None] == 43, -1e9, -0.01) * np.ones(shape),
    "0": lambda rng, shape: np.zeros(shape),
}


@product("form", FORMS, "kind", ["head", "channel"], always=DEFAULT, rest_is_rare=True)
def test_decays_of_any_strength(form, kind):
    # A closed gate followed by open ones is where clipped exponents are wrong by up to 0.98, and a shut one where
    # differences of cumulative sums are.
    inputs = sample(steps=64, batch=1, decay=kind)
    shape = inputs["log_decay"].shape
    for strength, draw in DECAYS.items():
        inputs["log_decay"] = draw(np.random.default_rng(3), shape).astype(np.float32)
        found = errors(form, inputs)
        assert max(found.values()) < 1e-5, (strength, found)


@product("form", FORMS, "kind", ["head", "channel"], always=DEFAULT, rest_is_rare=True)
def test_small_gate_gradients_keep_their_digits(form, kind):
    # At -20 a step the gradients are 1e-9 of the products they come from: the textbook q d_q - k d_k has no correct digit.
    inputs = sample(steps=64, batch=1, decay=kind)
    inputs["log_decay"] = np.full_like(inputs["log_decay"], -20.0)
    cotangents = cotangents_for(inputs)
    found = np.asarray(differentiate(form)(inputs, None, cotangents)[1]["log_decay"], np.float64)
    expected = gradients(run(inputs)[2], *cotangents)["log_decay"]
    assert np.median(np.abs(found - expected) / np.abs(expected)) < 1e-5


# Log decays out of normal numbers as layers make them, and closed ones.
GATES = {
    "GLA": lambda x: -np.logaddexp(0, -x) / 16,
    "log sigmoid": lambda x: -np.logaddexp(0, -x),
    "RWKV-6": lambda x: -np.exp(x - 2),
    "-5 to -20": lambda x: -12.5 + 7.5 * np.tanh(x),
}


def narrow(inputs, dtype=jnp.bfloat16):
    """Inputs as a layer that computes in `dtype` has them: decays and state are float32."""
    return {name: jnp.asarray(x, dtype if name in ("q", "k", "v") else None) for name, x in inputs.items()}


def gate_gradient_errors(inputs, differentiate, judge):
    """For each of GATES the error of log_decay's gradient in bfloat16 as a part of its length (L2), against float64.

    `differentiate` is one of a form (see forms.py), `judge` of (inputs, reset, *cotangents) its last result.
    """
    d_o, d_state = cotangents_for(inputs)
    cotangents = jnp.asarray(d_o, jnp.bfloat16), d_state
    x = np.random.default_rng(3).standard_normal(inputs["log_decay"].shape)
    found = {}
    for name, gate in GATES.items():
        inputs = narrow(inputs | {"log_decay": gate(x).astype(np.float32)})
        gradient = np.asarray(differentiate(inputs, None, cotangents)[1]["log_decay"], np.float64)
        expected = judge(inputs, None, *cotangents)[-1]["log_decay"]
        found[name] = np.linalg.norm(gradient - expected) / np.linalg.norm(expected)
    return found


def judge(inputs, reset, *cotangents):
    """Outputs, final state and gradients in float64."""
    o, state, tape = run(inputs, reset)
    return o, state, gradients(tape, *cotangents)


@product("steps", [1, 2, 7, 16, 33], "chunk_size", [64, 1, 3, 16])
def test_any_length_and_any_chunk_size(steps, chunk_size):
    inputs = sample(steps=steps, decay="channel", bonus=steps % 2 == 0)
    found_o, found_state = fast_jit(
        lambda inputs: gated_linear_attention(**inputs, implementation="chunked", chunk_size=chunk_size)
    )(inputs)
    o, state, _ = run(inputs)
    assert relative_error(found_o, o) < TOLERANCE
    assert relative_error(found_state, state) < TOLERANCE


@default_form
def test_carrying_the_state_over_a_cut_changes_nothing(form):
    inputs = sample(steps=37, decay="channel")
    assert_a_cut_changes_nothing(evaluate(form), inputs, ("q", "k", "v", "log_decay"), TOLERANCE)


@default_form
def test_no_state_is_a_state_of_zeros(form):
    inputs = sample(steps=19, decay="head")
    inputs.pop("state")
    o, state = evaluate(form)(inputs, None)
    expected_o, expected_state, _ = run(inputs | {"state": np.zeros((2, 2, 8, 6))})
    assert relative_error(o, expected_o) < TOLERANCE
    assert relative_error(state, expected_state) < TOLERANCE


@default_form
def test_a_decay_of_minus_infinity_forgets_like_a_reset(form):
    inputs = sample(steps=37, decay="channel")
    reset = marks(inputs, (5, 16), (30,))
    inputs["log_decay"] = np.where(reset[:, :, None, None], -np.inf, inputs["log_decay"]).astype(np.float32)
    found = errors(form, inputs)
    assert max(found.values()) < TOLERANCE, found
    assert relative_error(evaluate(form)(inputs, None)[0], evaluate(form)(inputs, reset)[0]) < TOLERANCE


ACCIDENTS = {
    "q": ("q", (0, 10, 1, 2)),
    "k": ("k", (0, 10, 1, 2)),
    "v": ("v", (0, 10, 1, 2)),
    "decay": ("log_decay", (0, 10, 1, 2)),
    "decay at a start": ("log_decay", (0, 7, 1, 2)),
    "decay at an end": ("log_decay", (0, 19, 1, 2)),
    "value decay": ("value_log_decay", (0, 10, 1, 2)),
    "state": ("state", (0, 1, 2, 3)),
    "last step": ("v", (0, 36, 1, 2)),
}


@product("form", FORMS, "bonus", [False, True], always=DEFAULT, rest_is_rare=True)
def test_an_accident_stays_in_its_document_and_head(form, bonus):
    for value in (np.nan, np.inf):
        check_accidents(form, sample(steps=37, decay="channel", value_decay=True, bonus=bonus), value)


def check_accidents(form, inputs, value):
    """Where the definition has a non-finite output or state vector every form must have one, and nowhere else."""
    reset = marks(inputs, (7, 20), (5,))
    cotangents = cotangents_for(inputs)
    clean_outputs, clean_gradients = differentiate(form)(inputs, reset, cotangents)
    for accident, (name, place) in ACCIDENTS.items():
        if name not in inputs:
            continue
        hurt = inputs | {name: inputs[name].copy()}
        hurt[name][place] = value
        with np.errstate(invalid="ignore", over="ignore"):
            judged_o, judged_state, _ = run(hurt, reset)
        judged_o_bad = ~np.isfinite(judged_o).all(-1)
        judged_state_bad = ~np.isfinite(judged_state).all((-1, -2))
        (o, state), grads = differentiate(form)(hurt, reset, cotangents)
        np.testing.assert_array_equal(~np.isfinite(o).all(-1), judged_o_bad, err_msg=accident)
        np.testing.assert_array_equal(~np.isfinite(state).all((-1, -2)), judged_state_bad, err_msg=accident)
        np.testing.assert_array_equal(np.asarray(o)[~judged_o_bad], np.asarray(clean_outputs[0])[~judged_o_bad])
        np.testing.assert_array_equal(np.asarray(state)[~judged_state_bad], np.asarray(clean_outputs[1])[~judged_state_bad])
        ids = np.cumsum(reset, axis=1)
        document = 0 if name == "state" else ids[0, place[1]]
        elsewhere = np.ones((2, 37), bool)
        elsewhere[0] = ids[0] != document
        for moved in inputs.keys() - {"state", "bonus"}:
            np.testing.assert_array_equal(
                np.asarray(grads[moved])[elsewhere],
                np.asarray(clean_gradients[moved])[elsewhere],
                err_msg=f"{accident}, d {moved}",
            )


@default_form
def test_bfloat16_inputs_keep_a_float32_state(form):
    inputs = sample(steps=37, decay="channel")
    narrow = {name: x if name in ("log_decay", "state") else jnp.asarray(x, jnp.bfloat16) for name, x in inputs.items()}
    cotangents = cotangents_for(inputs)
    cotangents = (jnp.asarray(cotangents[0], jnp.bfloat16), cotangents[1])
    (o, state), grads = differentiate(form)(narrow, None, cotangents)
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    expected_o, expected_state, tape = run(narrow)
    expected = gradients(tape, *cotangents)
    assert relative_error(o, expected_o) < 4e-3  # rounding to 8 bits
    assert relative_error(state, expected_state) < TOLERANCE
    for name, grad in grads.items():
        assert grad.dtype == narrow[name].dtype
        assert relative_error(grad, expected[name]) < 4e-3, name
    assert relative_error(grads["log_decay"], expected["log_decay"]) < TOLERANCE


@pytest.mark.tools
def test_transformations_agree_with_the_plain_gradient():
    inputs = sample(steps=21, decay="channel", bonus=True)
    reset = marks(inputs, (5,), ())
    cotangents = cotangents_for(inputs)
    (plain_o, _), plain = differentiate("chunked")(inputs, reset, cotangents)

    def loss(inputs, reset, cotangents):
        o, state = call("chunked", inputs, reset)
        return jnp.sum(o * cotangents[0]) + jnp.sum(state * cotangents[1])

    rematerialised = fast_jit(jax.grad(jax.checkpoint(loss)))(inputs, reset, cotangents)
    for name in inputs:
        assert relative_error(rematerialised[name], plain[name]) < TOLERANCE

    # vmap over an extra axis, here the rows of the batch one by one; the bonus is shared by all rows
    axes = {name: None if name == "bonus" else 0 for name in inputs}
    by_row = {name: x if name == "bonus" else x[:, None] for name, x in inputs.items()}
    mapped = fast_jit(jax.vmap(jax.grad(loss), in_axes=(axes, 0, 0)))(
        by_row, reset[:, None], tuple(x[:, None] for x in cotangents)
    )
    for name in inputs:
        row_gradients = mapped[name].sum(0) if name == "bonus" else mapped[name][:, 0]
        assert relative_error(row_gradients, plain[name]) < TOLERANCE, name

    # a scan over layers: the op applied twice to its own output
    def stacked(v):
        return jax.lax.scan(lambda v, _: (call("chunked", inputs | {"v": v}, reset)[0], None), v, None, length=2)[0]

    def unrolled(v):
        for _ in range(2):
            v = call("recurrent", inputs | {"v": v}, reset)[0]
        return v

    def pulled(layers):
        return fast_jit(lambda v: jax.vjp(layers, v)[1](plain_o)[0])(inputs["v"])

    assert relative_error(fast_jit(stacked)(inputs["v"]), fast_jit(unrolled)(inputs["v"])) < TOLERANCE
    assert relative_error(pulled(stacked), pulled(unrolled)) < TOLERANCE


def test_differentiating_twice():
    inputs = sample(steps=9, decay="channel", batch=1)

    def directional(form):
        def norm(q):
            o, _ = call(form, inputs | {"q": q}, None)
            return jnp.sum(o**3)

        return fast_jit(jax.grad(lambda q: jnp.sum(jax.grad(norm)(q) ** 2)))(inputs["q"])

    assert relative_error(directional("chunked"), directional("recurrent")) < TOLERANCE


def test_float32_inputs_get_float32_products_on_every_device():
    inputs = sample(steps=37, decay="channel", value_decay=True)
    for form in FORMS:
        jaxpr = str(jax.make_jaxpr(jax.grad(lambda inputs, form=form: sum(x.sum() for x in call(form, inputs, None))))(inputs))
        products = jaxpr.count("dot_general[")
        assert products > 0 and jaxpr.count("Precision.HIGHEST, Precision.HIGHEST") == products, form


def test_the_backward_pass_of_chunks_keeps_only_their_starts():
    # 1024 steps of a 32 x 32 state are 4 MiB a head; 32 chunk starts are 128 KiB.
    inputs = sample(steps=1024, batch=1, heads=1, channels=32, width=32, decay="channel")
    cotangents = cotangents_for(inputs)

    def temporary_bytes(form):
        return differentiate(form).lower(inputs, None, cotangents).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes("recurrent") > 4 * 2**20
    assert temporary_bytes("chunked") < 2**20


def test_one_step_by_default_is_the_recurrence_and_more_is_chunked():
    inputs = sample(steps=37, decay="channel")
    assert "scan" in str(jax.make_jaxpr(lambda: gated_linear_attention(**inputs))())
    one = {name: x if name == "state" else x[:, :1] for name, x in inputs.items()}
    assert "custom_vjp" not in str(jax.make_jaxpr(lambda: gated_linear_attention(**one))())
    assert "custom_vjp" in str(jax.make_jaxpr(lambda: gated_linear_attention(**inputs))())


def test_a_missing_kernel_and_an_unknown_name_are_refused():
    inputs = sample(steps=3)
    with pytest.raises(NotImplementedError, match="Pallas"):
        gated_linear_attention(**inputs, implementation="pallas")
    with pytest.raises(ValueError, match="'fused' is not one of recurrent"):
        gated_linear_attention(**inputs, implementation="fused")
    with pytest.raises(ValueError, match="chunk_size=0"):
        gated_linear_attention(**inputs, chunk_size=0)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("k", (2, 3, 2, 9)),
        ("v", (2, 4, 2, 6)),
        ("v", (2, 3, 3, 6)),
        ("log_decay", (2, 3, 2)),
        ("log_decay", (2, 3, 2, 6)),
        ("value_log_decay", (2, 3, 2, 8)),
        ("bonus", (8,)),
        ("state", (2, 2, 6, 8)),
        ("reset", (2, 4)),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, shape):
    inputs = sample(steps=3)
    wrong = np.zeros(shape, bool if name == "reset" else np.float32)
    with pytest.raises(ValueError) as raised:
        gated_linear_attention(**(inputs | {name: wrong}))
    assert name in str(raised.value) and str(shape[-1]) in str(raised.value)


SWEEP = {
    "steps": st.integers(1, 20),
    "chunk_size": st.integers(1, 9),
    "groups": st.integers(1, 2),
    "repeats": st.integers(1, 3),
    "channels": st.integers(1, 5),
    "width": st.integers(1, 5),
    "decay": st.sampled_from([None, "head", "channel"]),
    "value_decay": st.booleans(),
    "bonus": st.booleans(),
    "marked": st.booleans(),
    "together": st.booleans(),
    "seed": st.integers(0, 9),
}


def check_one(steps, chunk_size, groups, repeats, marked, together, seed, **signature):
    inputs = sample(steps=steps, groups=groups, heads=groups * repeats, low=-20.0, seed=seed, **signature)
    reset = np.random.default_rng(seed).random((2, steps)) < 0.2 if marked else None
    cotangents = cotangents_for(inputs)

    def call(inputs):
        return gated_linear_attention(**inputs, reset=reset, implementation="chunked", chunk_size=chunk_size)

    @fast_jit
    def both(inputs, cotangents):
        outputs, pull = jax.vjp(call, inputs)
        return outputs, pull(cotangents)[0]

    with traced_for("chunked_together" if together else "chunked"):
        (o, state), grads = both(inputs, cotangents)
    expected_o, expected_state, tape = run(inputs, reset)
    expected = gradients(tape, *cotangents)
    found = {name: relative_error(grads[name], expected[name]) for name in inputs}
    found |= {"o": relative_error(o, expected_o), "final state": relative_error(state, expected_state)}
    # A decay's gradient is a sum over its head's state; of a few numbers that cancel rounding is more.
    assert all(error < (1e-4 if "decay" in name else 1e-5) for name, error in found.items()), found


@pytest.mark.tools
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(**{name: strategy for name, strategy in SWEEP.items()})
def test_a_sweep_of_small_shapes(**choice):
    check_one(**choice)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(**{name: strategy for name, strategy in SWEEP.items()})
def test_a_long_sweep_of_small_shapes(**choice):
    check_one(**choice)
