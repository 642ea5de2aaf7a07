"""The TPU kernel of the elementwise recurrence, in its interpreter: against float64 numpy, and lowered for a TPU."""

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from seqmodels.ops import compile_for, linear_recurrence
from seqmodels.ops.kernels.tpu import linear_recurrence as kernel
from tests.ops import test_linear_recurrence as xla
from tests.ops.kernels.running import kernels_of

TOLERANCE = 5e-6  # float32 against float64, relative to the largest value


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the tests of other forms on the kernel."""
    differentiate = xla.differentiate
    monkeypatch.setattr(xla, "differentiate", lambda form: differentiate(form, "tpu"))
    with kernels_of("tpu"):
        yield


def errors(inputs, reset=None):
    with kernels_of("tpu"):
        return xla.errors("pallas", inputs, reset, "tpu")


@pytest.mark.parametrize("is_complex, documents", [(False, True), (True, True), (True, False)])
def test_values_states_and_gradients(is_complex, documents):
    inputs = xla.sample(steps=37, is_complex=is_complex)
    found = errors(inputs, xla.marks(inputs, (5, 16, 17), (0, 30, 36)) if documents else None)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("steps, channels", [(1, ()), (7, (130,)), (8, (3, 2))])
def test_any_shape(steps, channels):
    inputs = xla.sample(steps=steps, channels=channels)
    found = errors(inputs, xla.marks(inputs, (steps // 2,), (0,)))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("strength", ["-20", "to -300", "one closed", "all open"])
def test_decays_of_any_strength_over_stretches(strength):
    # 300 steps are two stretches.
    inputs = xla.sample(steps=300, batch=1)
    inputs["a"] = xla.DECAYS[strength](np.random.default_rng(3), inputs["a"].shape).astype(np.float32)
    found = errors(inputs)
    assert max(found.values()) < TOLERANCE, found


def test_blocks_of_channels():
    # 1152 channels are three blocks of 384.
    inputs = xla.sample(steps=9, channels=(1152,))
    found = errors(inputs)
    assert max(found.values()) < TOLERANCE, found


def test_golden(interpreted):
    xla.test_goldens("pallas", "diag_recurrence_strong")


@pytest.mark.parametrize("is_complex", [True])
def test_an_accident_stays_in_its_document_and_channel(is_complex, interpreted):
    xla.test_an_accident_stays_in_its_document_and_channel("pallas", np.nan, is_complex)


def test_narrow_inputs_keep_a_float32_state(interpreted):
    xla.test_narrow_inputs_keep_a_float32_state("pallas")


@pytest.mark.slow
def test_transformations_agree_with_the_plain_gradient(interpreted):
    xla.test_transformations_agree_with_the_plain_gradient("pallas")


def test_the_interpreter_that_models_the_memories_agrees():
    inputs = xla.sample(steps=20, is_complex=True)
    reset = xla.marks(inputs, (5,), ())
    params = pltpu.InterpretParams(uninitialized_memory="nan")
    found, expected = (
        jax.jit(lambda a, b, state, reset, how=how: kernel.scan(a, b, state, reset, reverse=True, interpret=how))(
            inputs["a"], inputs["b"], inputs["state"], reset
        )
        for how in (params, True)
    )
    for got, want in zip(found, expected):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@pytest.mark.parametrize("documents", [False, True])
def test_lowers_for_a_tpu(dtype, documents):
    shape = jax.ShapeDtypeStruct((2, 512, 1536), dtype)
    reset = jax.ShapeDtypeStruct((2, 512), "bool") if documents else None

    def gradients(a, b, reset):
        outputs, pull = jax.vjp(lambda a, b: linear_recurrence(a, b, reset=reset), a, b)
        return pull(outputs)

    with compile_for("tpu"):
        exported = jax.export.export(jax.jit(gradients), platforms=["tpu"])(shape, shape, reset)
    assert exported.mlir_module().count("tpu_custom_call") == 2


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    steps=st.integers(1, 300),
    channels=st.integers(1, 300),
    is_complex=st.booleans(),
    marked=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_sweep_of_shapes(steps, channels, is_complex, marked, seed):
    inputs = xla.sample(steps=steps, channels=(channels,), is_complex=is_complex, low=-20.0, seed=seed)
    reset = np.random.default_rng(seed).random((2, steps)) < 0.2 if marked else None
    found = errors(inputs, reset)
    assert max(found.values()) < 1e-5, found
