"""The delta rule against other people's numbers and against float64 numpy: values, states, gradients, in every form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.ops import delta_rule
from seqmodels.ops.chunk import unit_lower_inverse
from tests import goldens
from tests.ops import forms
from tests.ops.forms import DEFAULT, assert_a_cut_changes_nothing, cotangents_for, marks, options, traced_for
from tests.ops.judge import relative_error
from tests.products import product, rest_in_tools
from tests.programs import fast_jit

FORMS = ("recurrent", "chunked", "chunked_together")
# float32 against float64, relative to the largest value; measured 1e-6 or less at these lengths
TOLERANCE = 5e-6

every_form = pytest.mark.parametrize("form", FORMS)
default_form = pytest.mark.parametrize("form", rest_in_tools(FORMS, DEFAULT))  # the others are in `make test-tools`


def evaluate(form):
    return forms.evaluate(form, op=delta_rule)


def differentiate(form):
    return forms.differentiate(form, op=delta_rule)


def call(form, inputs, reset):
    return forms.call(form, inputs, reset, op=delta_rule)


def sample(
    *, steps, heads=2, groups=None, batch=2, channels=8, width=6, decay=None, low=-5.0, correlation=0.0, largest=2.0, seed=0
):
    """Inputs by name; `decay` is None, "head" or "channel", uniform in [low, 0]; beta uniform in [0, `largest`]; keys of length 1."""
    rng = np.random.default_rng(seed)
    groups = groups or heads
    common = rng.standard_normal((batch, 1, groups, channels))
    k = correlation**0.5 * common + (1 - correlation) ** 0.5 * rng.standard_normal((batch, steps, groups, channels))
    inputs = {
        "q": rng.standard_normal((batch, steps, groups, channels)),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.standard_normal((batch, steps, heads, width)),
        "beta": rng.uniform(0, largest, (batch, steps, heads)),
        "state": rng.standard_normal((batch, heads, channels, width)),
    }
    if decay:
        inputs["log_decay"] = rng.uniform(low, 0, (batch, steps, heads, channels if decay == "channel" else 1))
    return {name: value.astype(np.float32) for name, value in inputs.items()}


def judge(inputs, reset, d_output, d_state):
    """Outputs, final state, gradients by name of <output, d_output> + <final state, d_state>, step by step in float64."""
    x = {name: np.asarray(value, np.float64) for name, value in inputs.items()}
    batch, steps, heads, _ = x["v"].shape
    repeats = heads // x["q"].shape[2]
    q, k, v, beta = np.repeat(x["q"], repeats, 2), np.repeat(x["k"], repeats, 2), x["v"], x["beta"][..., None]
    decay = np.exp(x["log_decay"])[..., None] if "log_decay" in x else np.ones((batch, steps, heads, 1, 1))
    starts = np.zeros((batch, steps), bool) if reset is None else np.asarray(reset)
    starts = starts[:, :, None, None, None]

    state, tape, output = x["state"], [], np.zeros_like(v)
    for t in range(steps):
        before = np.where(starts[:, t], 0.0, state)
        faded = decay[:, t] * before
        wrong = v[:, t] - np.einsum("bhk,bhkv->bhv", k[:, t], faded)
        state = faded + np.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t] * wrong)
        output[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], state)
        tape.append((before, faded, wrong, state))

    d_output, d = np.asarray(d_output, np.float64), np.asarray(d_state, np.float64)
    d_q, d_k, d_v, d_beta = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros_like(beta)
    d_log = np.zeros((batch, steps, heads, k.shape[3]))
    for t in reversed(range(steps)):
        before, faded, wrong, after = tape[t]
        d_q[:, t] = np.einsum("bhkv,bhv->bhk", after, d_output[:, t])
        d = d + np.einsum("bhk,bhv->bhkv", q[:, t], d_output[:, t])
        d_update = np.einsum("bhkv,bhk->bhv", d, k[:, t])
        d_beta[:, t] = (d_update * wrong).sum(-1, keepdims=True)
        d_v[:, t] = beta[:, t] * d_update
        d_k[:, t] = np.einsum("bhkv,bhv->bhk", d, beta[:, t] * wrong) - np.einsum("bhkv,bhv->bhk", faded, d_v[:, t])
        d = decay[:, t] * (d - np.einsum("bhk,bhv->bhkv", k[:, t], d_v[:, t]))
        d_log[:, t] = (d * before).sum(-1)
        d = np.where(starts[:, t], 0.0, d)

    def by_group(x):
        return x.reshape(batch, steps, heads // repeats, repeats, -1).sum(3)

    gradients = {"q": by_group(d_q), "k": by_group(d_k), "v": d_v, "beta": d_beta[..., 0], "state": d}
    if "log_decay" in x:
        gradients["log_decay"] = d_log if x["log_decay"].shape[-1] > 1 else d_log.sum(-1, keepdims=True)
    return output, state, gradients


def errors(form, inputs, reset=None, compute=None):
    """Relative error of the outputs, the final state and every gradient."""
    cotangents = cotangents_for(inputs)
    (o, state), grads = (compute or differentiate(form))(inputs, reset, cotangents)
    expected_o, expected_state, expected = judge(inputs, reset, *cotangents)
    found = {name: relative_error(grads[name], expected[name]) for name in inputs}
    return {"o": relative_error(o, expected_o), "final state": relative_error(state, expected_state), **found}


GOLDENS = (
    "delta_rule",
    "gated_delta_rule",
    "gated_delta_rule_strong",
    "gated_delta_rule_extreme",
    "kda",
    "kda_strong",
    "kda_gva",
)


@pytest.mark.parametrize("form", goldens.golden_forms(*FORMS))
@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name, form):
    arrays = goldens.load(name).arrays

    def operation(x):
        decay = x["g"] if "g" in x else None
        if decay is not None and decay.ndim == 3:
            decay = decay[..., None]
        q = x["q"] * x["q"].shape[-1] ** -0.5
        return delta_rule(q, x["k"], x["v"], x["beta"], decay, state=x["h0"], **options(form))

    @fast_jit
    def both(inputs, cotangents):
        outputs, pull = jax.vjp(operation, inputs)
        return outputs, operation(inputs | {"h0": jnp.zeros_like(inputs["h0"])}), pull(cotangents)[0]

    inputs = {key: arrays[key] for key in ("q", "k", "v", "g", "beta", "h0") if key in arrays}
    with traced_for(form):
        outputs, empty, gradients = both(inputs, (arrays["cot_o"], arrays["cot_ht"]))
    found = {key: relative_error(x, arrays[key]) for key, x in zip(("o", "ht"), outputs)}
    found |= {key: relative_error(x, arrays[key]) for key, x in zip(("o_zero", "ht_zero"), empty)}
    found |= {f"grad_{key}": relative_error(gradients[key], arrays[f"grad_{key}"]) for key in inputs}
    assert max(found.values()) < 2e-6, found  # measured: 5e-7


SIGNATURES = {
    "no decay": {},
    "per head": {"decay": "head"},
    "per channel": {"decay": "channel"},
    "no decay, groups": {"heads": 4, "groups": 2},
    "per head, groups": {"decay": "head", "heads": 4, "groups": 2},
    "per channel, one group": {"decay": "channel", "heads": 3, "groups": 1},
}


@product("form", FORMS, "signature", SIGNATURES, always=DEFAULT)
def test_values_states_and_gradients_with_documents(form, signature):
    inputs = sample(steps=37, **SIGNATURES[signature])
    found = errors(form, inputs, marks(inputs, (5, 16, 17), (0, 30, 36)))
    assert max(found.values()) < TOLERANCE, found


DECAYS = {
    "to -5": lambda rng, shape: -rng.uniform(1e-2, 5, shape),
    "-20": lambda rng, shape: np.full(shape, -20.0),
    "to -300": lambda rng, shape: -np.exp(rng.uniform(np.log(1e-3), np.log(300), shape)),
    "one shut gate": lambda rng, shape: np.where(np.arange(shape[1])[None, :, None, None] == 43, -1e9, -0.01) * np.ones(shape),
}


@product("form", FORMS, "kind", ["head", "channel"], always=DEFAULT, rest_is_rare=True)
def test_decays_of_any_strength(form, kind):
    inputs = sample(steps=64, batch=1, decay=kind)
    shape = inputs["log_decay"].shape
    for strength, draw in DECAYS.items():
        inputs["log_decay"] = draw(np.random.default_rng(3), shape).astype(np.float32)
        found = errors(form, inputs)
        assert max(found.values()) < 1e-5, (strength, found)


@product("form", FORMS, "kind", ["head", "channel"], always=DEFAULT, rest_is_rare=True)
def test_small_gate_gradients_keep_their_digits(form, kind):
    # At -20 a step they are 1e-9 of the products they are made of: a difference of those would have no correct digit.
    inputs = sample(steps=64, batch=1, decay=kind)
    inputs["log_decay"] = np.full_like(inputs["log_decay"], -20.0)
    cotangents = cotangents_for(inputs)
    found = np.asarray(differentiate(form)(inputs, None, cotangents)[1]["log_decay"], np.float64)
    expected = judge(inputs, None, *cotangents)[2]["log_decay"]
    assert np.median(np.abs(found - expected) / np.abs(expected)) < 1e-5


KEYS = {
    "correlation .95": {"correlation": 0.95},
    "identical": {"correlation": 1.0},
    "identical, decay": {"correlation": 1.0, "decay": "channel", "low": -0.02},
}


@pytest.mark.parametrize("keys", KEYS)
def test_alike_keys_in_a_chunk_of_64(keys):
    # Neumann's series for (I + L)^-1 has no correct digit here, nor has Newton-Schulz.
    inputs = sample(steps=256, batch=1, channels=16, **KEYS[keys])

    @fast_jit
    def compute(inputs, reset, cotangents):
        outputs, pull = jax.vjp(lambda x: delta_rule(**x, reset=reset, implementation="chunked", chunk_size=64), inputs)
        return outputs, pull(cotangents)[0]

    for beta in (0.99, None):  # None: uniform in [0, 2], half of the eigenvalues negative
        inputs |= {} if beta is None else {"beta": np.full_like(inputs["beta"], beta)}
        found = errors(None, inputs, compute=compute)
        assert max(found.values()) < 1e-5, (beta, found)
        inputs = sample(steps=256, batch=1, channels=16, **KEYS[keys])


@pytest.mark.parametrize("size", [1, 2, 8, 64])
@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.95, 1.0])
def test_inverse_of_a_unit_lower_triangle(size, correlation):
    k = sample(steps=size, channels=64, correlation=correlation)["k"].astype(np.float64)
    overlaps = np.einsum("bihk,bjhk->bhij", k, k) * 0.99
    exact = np.linalg.inv(np.eye(size) + np.tril(overlaps, -1))
    found, pull = jax.vjp(unit_lower_inverse, jnp.asarray(overlaps, jnp.float32))
    assert relative_error(found, exact) < 1e-6
    cotangent = np.random.default_rng(2).standard_normal(exact.shape).astype(np.float32)
    transposed = np.swapaxes(exact, -1, -2)
    (gradient,) = pull(jnp.asarray(cotangent))
    assert relative_error(gradient, -np.tril(transposed @ cotangent.astype(np.float64) @ transposed, -1)) < 5e-6


def test_a_beta_of_one_stores_and_two_reflects():
    """What the numbers mean: beta = 1 makes the memory answer v under k; beta = 2 with v = 0 turns the answer around."""
    inputs = sample(steps=1, batch=1)
    one = inputs | {"q": inputs["k"], "beta": np.ones_like(inputs["beta"])}
    np.testing.assert_allclose(delta_rule(**one)[0], inputs["v"], atol=1e-6)
    before = jnp.einsum("bthk,bhkv->bthv", inputs["k"], inputs["state"])
    two = one | {"beta": 2 * one["beta"], "v": np.zeros_like(inputs["v"])}
    np.testing.assert_allclose(delta_rule(**two)[0], -before, atol=1e-6)


@product("steps", [1, 7, 33], "chunk_size", [64, 3, 16, 1])
def test_any_length_and_any_chunk_size(steps, chunk_size):
    inputs = sample(steps=steps, decay="channel")
    found_o, found_state = fast_jit(lambda inputs: delta_rule(**inputs, implementation="chunked", chunk_size=chunk_size))(inputs)
    o, state, _ = judge(inputs, None, *cotangents_for(inputs))
    assert relative_error(found_o, o) < TOLERANCE
    assert relative_error(found_state, state) < TOLERANCE


@default_form
def test_carrying_the_state_over_a_cut_changes_nothing(form):
    inputs = sample(steps=37, decay="channel")
    assert_a_cut_changes_nothing(evaluate(form), inputs, ("q", "k", "v", "beta", "log_decay"), TOLERANCE)


@default_form
def test_no_state_is_a_state_of_zeros(form):
    inputs = sample(steps=19, decay="head")
    zeros = inputs | {"state": np.zeros_like(inputs["state"])}
    expected_o, expected_state, _ = judge(zeros, None, *cotangents_for(inputs))
    inputs.pop("state")
    o, state = evaluate(form)(inputs, None)
    assert relative_error(o, expected_o) < TOLERANCE
    assert relative_error(state, expected_state) < TOLERANCE


ACCIDENTS = {
    "q": ("q", (0, 10, 1, 2)),
    "k": ("k", (0, 10, 1, 2)),
    "v": ("v", (0, 10, 1, 2)),
    "beta": ("beta", (0, 10, 1)),
    "decay": ("log_decay", (0, 10, 1, 2)),
    "decay at a start": ("log_decay", (0, 7, 1, 2)),
    "decay at an end": ("log_decay", (0, 19, 1, 2)),
    "state": ("state", (0, 1, 2, 3)),
    "last step": ("v", (0, 36, 1, 2)),
}


@default_form
def test_an_accident_stays_in_its_document_and_head(form):
    for value in (np.nan, np.inf):
        check_accidents(form, value)


def check_accidents(form, value):
    # Where the definition has a non-finite output or state vector every form must have one, and nowhere else.
    inputs = sample(steps=37, decay="channel")
    reset = marks(inputs, (7, 20), (5,))
    cotangents = cotangents_for(inputs)
    clean_outputs, clean_gradients = differentiate(form)(inputs, reset, cotangents)
    for accident, (name, place) in ACCIDENTS.items():
        hurt = inputs | {name: inputs[name].copy()}
        hurt[name][place] = value
        with np.errstate(invalid="ignore", over="ignore"):
            judged_o, judged_state, _ = judge(hurt, reset, *cotangents)
        (o, state), grads = differentiate(form)(hurt, reset, cotangents)
        for got, clean, judged, axes in [
            (o, clean_outputs[0], judged_o, -1),
            (state, clean_outputs[1], judged_state, (-1, -2)),
        ]:
            bad = ~np.isfinite(judged).all(axes)
            np.testing.assert_array_equal(~np.isfinite(got).all(axes), bad, err_msg=accident)
            np.testing.assert_array_equal(np.asarray(got)[~bad], np.asarray(clean)[~bad], err_msg=accident)
        ids = np.cumsum(reset, axis=1)
        elsewhere = np.ones((2, 37), bool)
        elsewhere[0] = ids[0] != (0 if name == "state" else ids[0, place[1]])
        for moved in ("q", "k", "v", "beta", "log_decay"):
            got, clean = np.asarray(grads[moved])[elsewhere], np.asarray(clean_gradients[moved])[elsewhere]
            np.testing.assert_array_equal(got, clean, err_msg=f"{accident}, d {moved}")


@default_form
def test_bfloat16_inputs_keep_a_float32_state(form):
    inputs = sample(steps=37, decay="channel")
    wide = ("log_decay", "state", "beta")
    narrow = {name: x if name in wide else jnp.asarray(x, jnp.bfloat16) for name, x in inputs.items()}
    cotangents = cotangents_for(inputs)
    cotangents = (jnp.asarray(cotangents[0], jnp.bfloat16), cotangents[1])
    (o, state), grads = differentiate(form)(narrow, None, cotangents)
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    expected_o, expected_state, expected = judge(narrow, None, *cotangents)
    assert relative_error(o, expected_o) < 4e-3  # rounding to 8 bits
    assert relative_error(state, expected_state) < TOLERANCE
    for name, grad in grads.items():
        assert grad.dtype == narrow[name].dtype
        assert relative_error(grad, expected[name]) < (TOLERANCE if name in wide else 4e-3), name


@pytest.mark.tools
def test_transformations_agree_with_the_plain_gradient():
    inputs = sample(steps=21, decay="channel")
    reset = marks(inputs, (5,), ())
    cotangents = cotangents_for(inputs)
    _, plain = differentiate("chunked")(inputs, reset, cotangents)

    def loss(inputs, reset, cotangents):
        o, state = call("chunked", inputs, reset)
        return jnp.sum(o * cotangents[0]) + jnp.sum(state * cotangents[1])

    rematerialised = fast_jit(jax.grad(jax.checkpoint(loss)))(inputs, reset, cotangents)
    by_row = jax.tree.map(lambda x: x[:, None], (inputs, reset, cotangents))
    mapped = fast_jit(jax.vmap(jax.grad(loss)))(*by_row)
    for name in inputs:
        assert relative_error(rematerialised[name], plain[name]) < TOLERANCE
        assert relative_error(mapped[name][:, 0], plain[name]) < TOLERANCE


@pytest.mark.tools
def test_differentiating_twice():
    inputs = sample(steps=9, decay="channel", batch=1)

    def directional(form):
        def norm(k):
            o, _ = call(form, inputs | {"k": k}, None)
            return jnp.sum(o**3)

        return fast_jit(jax.grad(lambda k: jnp.sum(jax.grad(norm)(k) ** 2)))(inputs["k"])

    assert relative_error(directional("chunked"), directional("recurrent")) < 1e-5


def test_float32_inputs_get_float32_products_on_every_device():
    inputs = sample(steps=37, decay="channel")
    for form in FORMS:
        jaxpr = str(jax.make_jaxpr(jax.grad(lambda inputs, form=form: sum(x.sum() for x in call(form, inputs, None))))(inputs))
        products = jaxpr.count("dot_general[")
        assert products > 0 and jaxpr.count("Precision.HIGHEST, Precision.HIGHEST") == products, form


def test_the_backward_pass_of_chunks_keeps_only_their_starts():
    # 1024 steps of a 32 x 32 state are 4 MiB a head; 64 chunk starts are 256 KiB.
    inputs = sample(steps=1024, batch=1, heads=1, channels=32, width=32, decay="channel")
    cotangents = cotangents_for(inputs)

    def temporary_bytes(form):
        return differentiate(form).lower(inputs, None, cotangents).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes("recurrent") > 4 * 2**20
    assert temporary_bytes("chunked") < 2**20


def test_what_does_not_exist_is_refused():
    inputs = sample(steps=3)
    for implementation, reason in [("associative", "K x K matrix"), ("parallel", "T x T matrix"), ("pallas", "Pallas")]:
        with pytest.raises(NotImplementedError, match=reason):
            delta_rule(**inputs, implementation=implementation)
    with pytest.raises(ValueError, match="'fused' is not one of recurrent"):
        delta_rule(**inputs, implementation="fused")
    with pytest.raises(ValueError, match="chunk_size=0"):
        delta_rule(**inputs, chunk_size=0)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("k", (2, 3, 2, 9)),
        ("v", (2, 4, 2, 6)),
        ("v", (2, 3, 3, 6)),
        ("beta", (2, 3, 2, 1)),
        ("log_decay", (2, 3, 2)),
        ("log_decay", (2, 3, 2, 6)),
        ("state", (2, 2, 6, 8)),
        ("reset", (2, 4)),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, shape):
    inputs = sample(steps=3)
    wrong = np.zeros(shape, bool if name == "reset" else np.float32)
    with pytest.raises(ValueError) as raised:
        delta_rule(**(inputs | {name: wrong}))
    assert name in str(raised.value) and str(shape[-1]) in str(raised.value)
