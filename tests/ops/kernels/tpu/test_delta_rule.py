"""The TPU kernels of the delta rule, in their interpreter: against float64 numpy, and lowered for a TPU at the sizes of models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from seqmodels.ops import delta_rule, record_choices
from seqmodels.ops.kernels.tpu import common
from seqmodels.ops.kernels.tpu import delta_rule as kernel
from tests.ops import test_delta_rule as xla
from tests.ops import test_gated_linear_attention as of_attention
from tests.ops.judge import relative_error
from tests.ops.kernels.lowering import lower_gradients_for_tpu
from tests.ops.kernels.running import kernels_of
from tests.programs import fast_jit

FORM = "pallas_tpu_default"  # a chunk has 128 steps
TOLERANCE = 5e-6  # float32 against float64, relative to the largest value


def chosen(steps):
    return [f"delta_rule: pallas tpu/delta_rule (chunk {min(128, steps)})"]


SIGNATURES = {
    "no decay, groups": {"heads": 4, "groups": 2},
    "per head, groups": {"decay": "head", "heads": 4, "groups": 2},
    "per channel, one group": {"decay": "channel", "heads": 2, "groups": 1},
}


@pytest.mark.parametrize("steps, signature", [*((130, signature) for signature in SIGNATURES), (37, "per head, groups")])
def test_values_states_and_gradients_with_documents(steps, signature):
    inputs = xla.sample(steps=steps, **SIGNATURES[signature])
    with record_choices() as choices:
        found = xla.errors(FORM, inputs, xla.marks(inputs, (5, 16, 17), (0, 30, steps - 1)))
    assert list(choices) == chosen(steps)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_decays_of_any_strength(kind):
    inputs = xla.sample(steps=256, batch=1, decay=kind)
    for strength, draw in xla.DECAYS.items():
        decay = draw(np.random.default_rng(3), inputs["log_decay"].shape)
        found = xla.errors(FORM, inputs | {"log_decay": decay.astype(np.float32)})
        assert max(found.values()) < 1e-5, (strength, found)


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_small_gate_gradients_keep_their_digits(kind):
    xla.test_small_gate_gradients_keep_their_digits(FORM, kind)


@pytest.mark.parametrize("name", ["delta_rule", "gated_delta_rule_extreme", "kda_strong", "kda_gva"])
def test_golden(name):
    xla.test_golden(name, FORM)


@pytest.mark.parametrize("correlation", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("steps", [16, 64, 128])
def test_inverses_of_unit_lower_triangles(steps, correlation):
    k = xla.sample(steps=steps, heads=5, channels=64, correlation=correlation)["k"].astype(np.float64)
    beta = np.random.default_rng(1).uniform(0, 2, (steps, 1))
    matrices = [np.tril(beta * (k[0, :, head] @ k[0, :, head].T), -1) for head in range(5)]
    for precision, tolerance in ((lax.Precision.HIGHEST, 1e-6), (lax.Precision.DEFAULT, 1e-4)):
        found = kernel._unit_lower_inverses([jnp.asarray(x, jnp.float32) for x in matrices], precision)
        for inverse, matrix in zip(found, matrices):
            assert relative_error(inverse, np.linalg.inv(np.eye(steps) + matrix)) < tolerance


@pytest.mark.parametrize("keys", xla.KEYS)
def test_alike_keys(keys):
    inputs = xla.sample(steps=256, batch=1, channels=16, **xla.KEYS[keys])
    for largest in (0.99, 2.0):  # above 1 eigenvalues are negative
        inputs["beta"] = np.random.default_rng(2).uniform(0, largest, inputs["beta"].shape).astype(np.float32)
        found = xla.errors(FORM, inputs)
        assert max(found.values()) < 1e-5, (largest, found)


@pytest.mark.parametrize("kind, correlation, tolerance", [(None, 0.0, 1e-2), ("head", 0.95, 1.5e-2), ("channel", 0.95, 1.5e-2)])
def test_bfloat16_operands_keep_a_float32_state(kind, correlation, tolerance):
    """What bfloat16 products may cost: a few units of 2^-9; measured 5.0e-3 and, of alike keys, 1.2e-2 or less."""
    signature = dict(channels=64, width=64, low=-0.01, largest=1.0, decay=kind, correlation=correlation)
    found = narrow_errors(of_attention.narrow(xla.sample(steps=256, batch=1, **signature)))
    assert max(found.values()) < tolerance, found


def narrow_errors(inputs):
    cotangents = xla.cotangents_for(inputs)
    cotangents = jnp.asarray(cotangents[0], jnp.bfloat16), cotangents[1]
    (o, state), gradients = xla.differentiate(FORM)(inputs, None, cotangents)
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert all(gradients[name].dtype == inputs[name].dtype for name in inputs)
    expected_o, expected_state, expected = xla.judge(inputs, None, *cotangents)
    found = {name: relative_error(gradients[name], expected[name]) for name in inputs}
    return found | {"o": relative_error(o, expected_o), "final state": relative_error(state, expected_state)}


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_gate_gradients_in_bfloat16(kind):
    inputs = xla.sample(steps=256, batch=1, heads=1, channels=64, width=64, decay=kind)
    found = of_attention.gate_gradient_errors(inputs, xla.differentiate(FORM), xla.judge)
    assert max(found.values()) < 4e-3, found


@pytest.mark.slow
def test_an_accident_stays_in_its_document_and_head():
    xla.check_accidents(FORM, np.nan)


# G, R, K, V, heads of a step (groups, of each)
LAYOUTS = {
    "four heads that are registers": ((8, 1, 32, 64), (4, 1)),
    "half of a group's heads": ((2, 8, 128, 32), (1, 4)),
    "all heads": ((3, 2, 8, 8), (3, 2)),
}


@pytest.mark.parametrize("layout, decay", [(layout, "channel") for layout in LAYOUTS] + [("half of a group's heads", "head")])
def test_heads_in_every_layout(layout, decay):
    """With bfloat16 inputs: of so many heads at once what lies between operations would not fit on chip in float32."""
    (groups, repeats, channels, width), blocks = LAYOUTS[layout]
    assert common.heads_at_once(groups, repeats, channels, width)[:2] == blocks
    sizes = dict(steps=20, batch=1, heads=groups * repeats, groups=groups, channels=channels, width=width)
    inputs = of_attention.narrow(xla.sample(decay=decay, **sizes))
    with record_choices() as choices:
        found = narrow_errors(inputs)
    assert list(choices) == chosen(20)
    assert max(found.values()) < 2e-2, found


def test_the_interpreter_that_models_the_memories_agrees():
    inputs = {name: jnp.asarray(x) for name, x in xla.sample(steps=20, batch=1, decay="head").items()}
    state, arguments = inputs["state"], [inputs[name] for name in ("q", "k", "v", "beta", "log_decay")]
    cotangents = xla.cotangents_for(inputs)

    def passes(how):
        o, final, starts = kernel.forward(*arguments, state, keep_starts=True, interpret=how)
        return o, final, *kernel.backward(*arguments, starts, *cotangents, interpret=how)

    found = jax.jit(lambda: passes(pltpu.InterpretParams(uninitialized_memory="nan")))()
    for got, want in zip(found, jax.jit(lambda: passes(True))()):
        assert relative_error(got, want) < 1e-6


# ---- choosing it, and lowering it for a TPU


def test_what_does_not_fit_on_chip_is_left_to_the_kernel_of_the_core():
    inputs = xla.sample(steps=300, batch=1, heads=16, channels=200, width=200, decay="channel")
    with kernels_of("tpu"), record_choices() as choices:
        jax.make_jaxpr(lambda x: delta_rule(**x, implementation="pallas"))(inputs)
    (choice,) = choices
    assert choice.startswith("delta_rule: pallas tpu/chunk_scan (chunk 64), not tpu/delta_rule: its step needs about ")


def test_chunks_of_another_length_are_left_to_the_kernel_of_the_core():
    inputs = xla.sample(steps=300, batch=1, decay="head")
    with kernels_of("tpu"), record_choices() as choices:
        jax.make_jaxpr(lambda x: delta_rule(**x, chunk_size=64, implementation="pallas"))(inputs)
    assert list(choices) == [
        "delta_rule: pallas tpu/chunk_scan (chunk 64), not tpu/delta_rule: its chunks have 128 steps, not 64"
    ]


SIZES = {  # G, H, K, V, decays
    "Gated DeltaNet": (8, 16, 128, 128, 1),
    "DeltaNet": (16, 16, 128, 128, None),
    "KDA": (4, 4, 64, 64, 64),
    "KDA of 128 channels": (8, 8, 128, 128, 128),
    "keys of 256": (4, 4, 256, 256, 1),
}


@pytest.mark.parametrize("model, dtype", [*((model, "bfloat16") for model in SIZES), ("Gated DeltaNet", "float32")])
def test_lowers_for_a_tpu(model, dtype):
    groups, heads, channels, width, decays = SIZES[model]
    of_heads = {"beta": None} | ({} if decays is None else {"log_decay": decays})
    sizes = dict(groups=groups, heads=heads, channels=channels, width=width, dtype=dtype)
    with record_choices() as choices:
        exported = lower_gradients_for_tpu(delta_rule, of_heads=of_heads, **sizes)
    assert list(choices) == chosen(256)
    assert exported.mlir_module().count("tpu_custom_call") == 2


SWEEP = {
    "steps": st.integers(1, 150),
    "groups": st.integers(1, 2),
    "repeats": st.integers(1, 3),
    "channels": st.integers(1, 5),
    "width": st.integers(1, 5),
    "decay": st.sampled_from([None, "head", "channel"]),
    "marked": st.booleans(),
    "seed": st.integers(0, 9),
}


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(**SWEEP)
def test_a_sweep_of_small_shapes(steps, groups, repeats, marked, seed, **signature):
    inputs = xla.sample(steps=steps, groups=groups, heads=groups * repeats, low=-20.0, seed=seed, **signature)
    reset = np.random.default_rng(seed).random((2, steps)) < 0.2 if marked else None

    @fast_jit
    def compute(inputs, reset, cotangents):
        outputs, pull = jax.vjp(lambda x: delta_rule(**x, reset=reset, implementation="pallas"), inputs)
        return outputs, pull(cotangents)[0]

    with kernels_of("tpu"):
        found = xla.errors(FORM, inputs, reset, compute)
    assert max(found.values()) < 1e-5, found
