"""The TPU kernel of the selective scan, in its interpreter: against float64 numpy, and lowered for a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from seqmodels.ops import compile_for, selective_scan
from seqmodels.ops.kernels.tpu import selective_scan as kernel
from tests.ops import test_selective_scan as xla
from tests.ops.judge import relative_error
from tests.ops.kernels.running import kernels_of

TOLERANCE = 5e-6  # float32 against float64, relative to the largest value


@pytest.fixture
def interpreted():
    with kernels_of("tpu"):
        yield


def errors(inputs, reset=None):
    with kernels_of("tpu"):
        return xla.errors("pallas", inputs, reset)


@pytest.mark.parametrize("documents", [False, True])
def test_values_states_and_gradients(documents):
    inputs = xla.sample(steps=37)
    found = errors(inputs, xla.marks(inputs, (5, 16, 17), (0, 30, 36)) if documents else None)
    assert max(found.values()) < TOLERANCE, found


def test_stretches_and_blocks_of_channels():
    # Two stretches of time, three blocks of 384 channels, two registers of numbers a channel.
    inputs = xla.sample(steps=130, batch=1, channels=1152, states=9)
    found = errors(inputs, xla.marks(inputs, (5, 128)))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("strength", ["-20", "to -300", "one closed gate", "0"])
def test_decays_of_any_strength_over_stretches(strength):
    inputs = xla.sample(steps=256, batch=1)
    inputs["A"] = np.full_like(inputs["A"], -1.0) * np.linspace(0.5, 1.0, 3, dtype=np.float32)
    inputs["dt"] = -xla.EXPONENTS[strength](np.random.default_rng(3), inputs["dt"].shape).astype(np.float32)
    found = errors(inputs)
    assert max(found.values()) < 1e-5, found


def test_golden(interpreted):
    xla.test_goldens("pallas", "mamba1_strong")


def test_gradients_to_later_inputs_are_exactly_zero(interpreted):
    xla.test_gradients_to_later_inputs_are_exactly_zero("pallas")


def test_an_accident_stays_in_its_document(interpreted):
    xla.test_an_accident_stays_in_its_document("pallas", np.nan)


def test_narrow_inputs_keep_a_float32_state(interpreted):
    xla.test_narrow_inputs_keep_a_float32_state("pallas")


def test_transformations_agree_with_the_plain_gradient(interpreted):
    xla.test_transformations_agree_with_the_plain_gradient("pallas")


def test_the_interpreter_that_models_the_memories_agrees(monkeypatch):
    monkeypatch.setattr(kernel, "_STEPS", 8)  # it takes a second for every ten steps
    inputs = xla.sample(steps=12, batch=1)
    reset, cotangents = xla.marks(inputs, (5,)), xla.cotangents_for(inputs)
    x, dt, A, B, C, state = (jnp.asarray(inputs[name]) for name in ("x", "dt", "A", "B", "C", "state"))

    def passes(how):
        y, final, starts = kernel.forward(x, dt, A, B, C, state, reset, keep_starts=True, interpret=how)
        return y, final, *kernel.backward(x, dt, A, B, C, reset, starts, *cotangents, interpret=how)

    found = jax.jit(lambda: passes(pltpu.InterpretParams(uninitialized_memory="nan")))()
    for got, want in zip(found, jax.jit(lambda: passes(True))()):
        assert relative_error(got, want) < 1e-6


def test_more_numbers_than_fit_are_refused_by_name_and_left_to_xla_by_default():
    inputs = xla.sample(steps=2, states=65)
    with kernels_of("tpu"):
        with pytest.raises(NotImplementedError, match="no Pallas kernel for this call: 65 numbers a channel"):
            selective_scan(**inputs, implementation="pallas")
        assert "pallas_call" not in str(jax.make_jaxpr(lambda: selective_scan(**inputs))())
        inputs["x"] = inputs["x"].astype(np.float16)
        with pytest.raises(NotImplementedError, match="x is float16"):
            selective_scan(**inputs, implementation="pallas")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("documents", [False, True])
def test_lowers_for_a_tpu(dtype, documents):
    def shaped(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    x, columns = shaped(2, 512, 1536), shaped(2, 512, 16)
    reset = shaped(2, 512, dtype="bool") if documents else None

    def gradients(x, dt, A, B, C, reset):
        outputs, pull = jax.vjp(lambda *inputs: selective_scan(*inputs, reset=reset), x, dt, A, B, C)
        return pull(outputs)

    with compile_for("tpu"):
        exported = jax.export.export(jax.jit(gradients), platforms=["tpu"])(
            x, shaped(2, 512, 1536), shaped(1536, 16, dtype="float32"), columns, columns, reset
        )
    assert exported.mlir_module().count("tpu_custom_call") == 2


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    steps=st.integers(1, 300),
    channels=st.integers(1, 200),
    states=st.integers(1, 17),
    marked=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_sweep_of_shapes(steps, channels, states, marked, seed):
    inputs = xla.sample(steps=steps, channels=channels, states=states, most=10.0, seed=seed)
    reset = np.random.default_rng(seed).random((2, steps)) < 0.2 if marked else None
    found = errors(inputs, reset)
    assert max(found.values()) < 1e-5, found
