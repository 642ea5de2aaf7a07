"""The TPU kernels of gated linear attention, in their interpreter: against float64 numpy, and lowered for a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from seqmodels.ops import compile_for, gated_linear_attention
from seqmodels.ops.kernels.tpu import common
from seqmodels.ops.kernels.tpu import gated_linear_attention as kernel
from tests.ops import forms
from tests.ops import test_gated_linear_attention as xla
from tests.ops import test_linear_attention_goldens as goldens
from tests.ops.judge import gradients, relative_error, run
from tests.ops.kernels.running import kernels_of
from tests.programs import fast_jit

FORM = "pallas_tpu"
TOLERANCE = 5e-6  # float32 against float64, relative to the largest value

SIGNATURES = {
    "no decay, bonus, groups": {"bonus": True, "heads": 4, "groups": 2},
    "per head, groups": {"decay": "head", "heads": 4, "groups": 2},
    "per channel, bonus": {"decay": "channel", "bonus": True},
    "per channel, one group": {"decay": "channel", "heads": 3, "groups": 1},
}


@pytest.mark.parametrize("signature", SIGNATURES)
def test_values_states_and_gradients_with_documents(signature):
    inputs = xla.sample(steps=37, **SIGNATURES[signature])
    found = xla.errors(FORM, inputs, xla.marks(inputs, (5, 16, 17), (0, 30, 36)))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.slow
@pytest.mark.parametrize("signature", [{}, {"bonus": True}, {"decay": "head", "bonus": True}, SIGNATURES["per channel, bonus"]])
def test_values_states_and_gradients_without_documents(signature):
    found = xla.errors(FORM, xla.sample(steps=37, **signature))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_decays_of_any_strength(kind):
    inputs = xla.sample(steps=256, batch=1, decay=kind)
    for strength in ("-20", "to -300", "one closed gate", "one shut gate", "0"):
        decay = xla.DECAYS[strength](np.random.default_rng(3), inputs["log_decay"].shape)
        found = xla.errors(FORM, inputs | {"log_decay": decay.astype(np.float32)})
        assert max(found.values()) < 1e-5, (strength, found)


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_small_gate_gradients_keep_their_digits(kind):
    xla.test_small_gate_gradients_keep_their_digits(FORM, kind)


@pytest.mark.parametrize("name", ["mamba2_strong", pytest.param("rwkv6_extreme", marks=pytest.mark.slow)])
def test_goldens(name):
    goldens.test_golden(name, FORM)


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_bfloat16_operands_keep_a_float32_state(kind):
    """What bfloat16 products may cost: a few units of 2^-9, in the gate's gradient as well, which adds like terms."""
    inputs = xla.narrow(xla.sample(steps=37, decay=kind))
    cotangents = xla.cotangents_for(inputs)
    cotangents = jnp.asarray(cotangents[0], jnp.bfloat16), cotangents[1]
    (o, state), grads = forms.differentiate(FORM)(inputs, None, cotangents)
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert all(grads[name].dtype == inputs[name].dtype for name in inputs)
    expected_o, expected_state, tape = run(inputs)
    expected = gradients(tape, *cotangents)
    found = {name: relative_error(grads[name], expected[name]) for name in inputs}
    found |= {"o": relative_error(o, expected_o), "final state": relative_error(state, expected_state)}
    assert max(found.values()) < 1e-2, found


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_gate_gradients_in_bfloat16(kind):
    """Sums of like-signed terms: measured 3e-3 or less, where q d_q - k d_k, of d_q and d_k in bfloat16, has 7e-3 to 16."""
    inputs = xla.sample(steps=256, batch=1, heads=1, channels=64, width=64, decay=kind)
    found = xla.gate_gradient_errors(inputs, forms.differentiate(FORM), xla.judge)
    assert max(found.values()) < 4e-3, found


def test_an_accident_stays_in_its_document_and_head():
    # Heads of 64 channels share registers.
    xla.check_accidents(FORM, xla.sample(steps=37, channels=64, decay="channel", bonus=True), np.nan)


# G, R, K, V, heads of a step (groups, of each)
LAYOUTS = {
    "four heads that are registers": ((8, 1, 32, 64), (4, 1)),
    "half of a group's heads": ((2, 8, 128, 32), (1, 4)),
    "all heads": ((3, 2, 8, 8), (3, 2)),
    "a group's heads side by side": ((2, 2, 64, 16), (2, 2)),
}


@pytest.mark.parametrize(
    "layout, decay",
    [
        ("four heads that are registers", "head"),
        ("half of a group's heads", "head"),
        ("half of a group's heads", "channel"),
        ("four heads that are registers", "channel"),
        ("a group's heads side by side", "channel"),
        pytest.param("all heads", "channel", marks=pytest.mark.slow),
    ],
)
def test_heads_in_every_layout(layout, decay):
    (groups, repeats, channels, width), blocks = LAYOUTS[layout]
    assert common.heads_at_once(groups, repeats, channels, width)[:2] == blocks
    sizes = dict(steps=20, batch=1, heads=groups * repeats, groups=groups, channels=channels, width=width)
    inputs = xla.sample(decay=decay, **sizes)
    found = xla.errors(FORM, inputs)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("kind", [pytest.param("head", marks=pytest.mark.slow), "channel"])
def test_the_interpreter_that_models_the_memories_agrees(kind):
    inputs = xla.sample(steps=20, batch=1, decay=kind)
    cotangents = xla.cotangents_for(inputs)
    options = dict(chunk_size=16, read_before=True, precision=lax.Precision.HIGHEST)
    start_log_mask = jnp.where(xla.marks(inputs, (5,)), -jnp.inf, 0.0)
    arguments = [jnp.asarray(inputs[name]) for name in ("q", "k", "v", "log_decay")]

    def passes(how):
        o, final, starts = kernel.forward(
            *arguments,
            start_log_mask,
            jnp.asarray(inputs["state"]),
            output_dtype=jnp.float32,
            keep_starts=True,
            interpret=how,
            **options,
        )
        found = kernel.backward(*arguments, start_log_mask, starts, *cotangents, interpret=how, **options)
        return o, final, *found

    found = jax.jit(lambda: passes(pltpu.InterpretParams(uninitialized_memory="nan")))()
    for got, want in zip(found, jax.jit(lambda: passes(True))()):
        assert relative_error(got, want) < 1e-6


def test_transformations_agree_with_the_plain_gradient():
    inputs = xla.sample(steps=21, decay="head")
    reset, cotangents = xla.marks(inputs, (5,), ()), xla.cotangents_for(inputs)
    forms.assert_transformations_agree(forms, FORM, inputs, reset, cotangents, TOLERANCE)


# ---- choosing it, and lowering it for a TPU


def test_heads_that_fill_no_registers_take_the_kernel_of_the_core():
    # 17 heads of 100 channels: no 16 of them end at a multiple of 128.
    inputs = xla.sample(steps=3, batch=1, heads=17, channels=100, width=100, decay="head")

    def kernels_in(**options):
        with compile_for("tpu"):
            return str(jax.make_jaxpr(lambda x: gated_linear_attention(**x, **options))(inputs))

    assert "custom_vjp_call" in kernels_in() and kernels_in().count("pallas_call") == 1
    assert "chunk_scan" in kernels_in(implementation="pallas")
    with compile_for("cpu"):
        assert "pallas_call" not in str(jax.make_jaxpr(lambda x: gated_linear_attention(**x))(inputs))


SIZES = {  # G, H, K, V, decays
    "GLA": (4, 4, 128, 256, 128),
    "RWKV-6": (16, 16, 64, 64, 64),
    "Mamba-2": (1, 24, 128, 64, 1),
    "RetNet": (4, 4, 64, 128, 1),
    "linear attention": (4, 4, 64, 64, None),
}


@pytest.mark.parametrize("model, dtype", [*((model, "bfloat16") for model in SIZES), ("GLA", "float32"), ("Mamba-2", "float32")])
def test_lowers_for_a_tpu(model, dtype):
    groups, heads, channels, width, decays = SIZES[model]

    def shaped(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct((2, 256, *shape), dtype)

    inputs = {"q": shaped(groups, channels), "k": shaped(groups, channels), "v": shaped(heads, width)}
    if decays is not None:
        inputs["log_decay"] = shaped(heads, decays, dtype="float32")

    def gradients(inputs):
        outputs, pull = jax.vjp(lambda x: gated_linear_attention(**x, implementation="pallas"), inputs)
        return outputs, pull(outputs)

    with compile_for("tpu"):
        traced = jax.jit(gradients).trace(inputs)
        assert "chunk_scan" not in str(traced.jaxpr)
        exported = jax.export.export(jax.jit(gradients), platforms=["tpu"])(inputs)
    assert exported.mlir_module().count("tpu_custom_call") == 2


SWEEP = {name: strategy for name, strategy in xla.SWEEP.items() if name not in ("together", "value_decay")}


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(**SWEEP | {"steps": st.integers(1, 40), "chunk_size": st.integers(1, 33)})
def test_a_sweep_of_small_shapes(steps, chunk_size, groups, repeats, marked, seed, **signature):
    inputs = xla.sample(steps=steps, groups=groups, heads=groups * repeats, low=-20.0, seed=seed, **signature)
    reset = np.random.default_rng(seed).random((2, steps)) < 0.2 if marked else None
    cotangents = xla.cotangents_for(inputs)

    @fast_jit
    def both(inputs, cotangents):
        outputs, pull = jax.vjp(functools.partial(call, reset=reset, implementation="pallas", chunk_size=chunk_size), inputs)
        return outputs, pull(cotangents)[0]

    def call(inputs, **options):
        return gated_linear_attention(**inputs, **options)

    with kernels_of("tpu"):
        (o, state), grads = both(inputs, cotangents)
    expected_o, expected_state, tape = run(inputs, reset)
    expected = gradients(tape, *cotangents)
    found = {name: relative_error(grads[name], expected[name]) for name in inputs}
    found |= {"o": relative_error(o, expected_o), "final state": relative_error(state, expected_state)}
    assert max(found.values()) < 1e-5, found
