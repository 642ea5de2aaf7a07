"""The TPU kernel of the recurrence over chunks, in its interpreter: against float64 numpy through both ops that use it (the delta rule
with chunks of another length than its own kernel's), the chunked form for its blocks, and lowered for a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from seqmodels.ops import compile_for, delta_rule, gated_linear_attention
from seqmodels.ops.chunk import Chunk, advance
from seqmodels.ops.kernels.tpu import chunk_scan
from tests.ops import forms
from tests.ops import test_delta_rule as of_delta_rule
from tests.ops import test_gated_linear_attention as of_attention
from tests.ops.judge import relative_error
from tests.ops.kernels.lowering import lower_gradients_for_tpu
from tests.ops.kernels.running import kernels_of
from tests.programs import fast_jit

FORM = "pallas_tpu"
# float32 against float64, relative to the largest value
TOLERANCE = 5e-6

DELTA = {
    "no decay, groups": {"heads": 4, "groups": 2},
    "per channel, one group": {"decay": "channel", "heads": 3, "groups": 1},
}


@pytest.mark.parametrize("bonus", [True, False])
def test_gated_linear_attention_with_decays_on_both_sides(bonus):
    inputs = of_attention.sample(steps=37, decay="channel", value_decay=True, bonus=bonus)
    found = of_attention.errors(FORM, inputs, of_attention.marks(inputs, (5, 16, 17), (0, 30, 36)) if bonus else None)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("signature", DELTA)
def test_delta_rule(signature):
    inputs = of_delta_rule.sample(steps=37, **DELTA[signature])
    found = of_delta_rule.errors(FORM, inputs, of_delta_rule.marks(inputs, (5, 16, 17), (0, 30, 36)))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("strength", ["to -300", "one shut gate"])
def test_decays_of_any_strength(strength):
    inputs = of_delta_rule.sample(steps=64, batch=1, decay="head")
    decay = of_delta_rule.DECAYS[strength](np.random.default_rng(3), inputs["log_decay"].shape)
    found = of_delta_rule.errors(FORM, inputs | {"log_decay": decay.astype(np.float32)})
    assert max(found.values()) < 1e-5, found


def test_golden():
    with forms.traced_for(FORM):
        of_delta_rule.test_golden("kda_gva", FORM)


def test_bfloat16_operands_keep_a_float32_state():
    """What bfloat16 products may cost: a few units of 2^-9."""
    inputs = of_attention.narrow(of_delta_rule.sample(steps=37, decay="channel"))
    cotangents = of_delta_rule.cotangents_for(inputs)
    cotangents = jnp.asarray(cotangents[0], jnp.bfloat16), cotangents[1]
    (o, state), gradients = of_delta_rule.differentiate(FORM)(inputs, None, cotangents)
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert all(gradients[name].dtype == inputs[name].dtype for name in inputs)
    expected_o, expected_state, expected = of_delta_rule.judge(inputs, None, *cotangents)
    found = {name: relative_error(gradients[name], expected[name]) for name in inputs}
    found |= {"o": relative_error(o, expected_o), "final state": relative_error(state, expected_state)}
    assert max(found.values()) < 1e-2, found


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_gate_gradients_in_bfloat16(kind):
    """Measured 1.3e-3 or less; see that of gated linear attention."""
    inputs = of_delta_rule.sample(steps=256, batch=1, heads=1, channels=64, width=64, decay=kind)
    found = of_attention.gate_gradient_errors(inputs, of_delta_rule.differentiate(FORM), of_delta_rule.judge)
    assert max(found.values()) < 4e-3, found


@pytest.mark.slow
def test_an_accident_stays_in_its_document_and_head():
    of_delta_rule.test_an_accident_stays_in_its_document_and_head(FORM, np.nan)


def chunks(*, count=2, batch=2, groups=1, repeats=1, steps=8, channels=8, width=8, names, shared=(), seed=0):
    """A chunk with the named arrays, those in ``shared`` with one array for all repeats; a state; cotangents."""
    rng = np.random.default_rng(seed)
    columns = {"read": channels, "write": channels, "erase": channels, "scores": steps, "keep": channels}
    arrays = {}
    for name in names:
        lead = (count, batch, groups, 1 if name in shared else repeats)
        rows = () if name in ("keep", "value_keep") else (steps,)
        x = rng.standard_normal((*lead, *rows, columns[name] if name in columns else width)) * 0.3
        arrays[name] = np.abs(x) if name in ("keep", "value_keep", "value_read") else x
    state = rng.standard_normal((batch, groups, repeats, channels, width))
    cotangents = rng.standard_normal((count, batch, groups, repeats, steps, width)), rng.standard_normal(state.shape)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (Chunk(**{"inside": None} | arrays), state, cotangents))


def passes(chunk, state, cotangents, *, precision, kernel, interpret=True):
    """Outputs, final state, starts, the cotangents of the states after chunks and before the first."""
    if kernel:
        both = chunk_scan.forward(chunk, state, precision=precision, keep_starts=True, interpret=interpret)
        return *both, *chunk_scan.backward(chunk, *cotangents, precision=precision, interpret=interpret)

    def step(state, chunk):
        output, following = advance(chunk, state, precision)
        return following, (output, state)

    final, (outputs, starts) = lax.scan(step, state, chunk)

    def back(d_state, x):
        chunk, start, d_output = x
        _, pull = jax.vjp(lambda state: advance(chunk, state, precision), start)
        return pull((d_output, d_state))[0], d_state

    d_first, d_ends = lax.scan(back, cotangents[1], (chunk, starts, cotangents[0]), reverse=True)
    return outputs, final, starts, d_ends, d_first


CASES = {
    "delta, repeats": dict(names=("read", "write", "value", "scores", "erase", "keep"), repeats=3, shared=("read", "write")),
    "four heads a step, both sides": dict(
        names=("read", "write", "value", "inside", "keep", "value_read", "value_keep"), batch=4
    ),
    "three heads a step": dict(names=("read", "write", "value", "inside"), batch=3, groups=3),
    "a state in blocks": dict(names=("read", "write", "value", "inside", "value_read", "value_keep"), width=1152),
}


@pytest.mark.parametrize("case", CASES)
def test_passes_in_every_layout(case):
    arguments = chunks(**CASES[case])
    run = functools.partial(passes, precision=lax.Precision.HIGHEST)
    found = fast_jit(functools.partial(run, kernel=True))(*arguments)
    expected = fast_jit(functools.partial(run, kernel=False))(*arguments)
    for got, want in zip(found, expected):
        assert relative_error(got, want) < 2e-6
    without_starts = fast_jit(
        lambda chunk, state: chunk_scan.forward(chunk, state, precision=lax.Precision.HIGHEST, keep_starts=False, interpret=True)
    )(*arguments[:2])
    assert without_starts[2] is None
    np.testing.assert_array_equal(without_starts[0], found[0])


def test_the_interpreter_that_models_the_memories_agrees():
    arguments = chunks(**CASES["delta, repeats"])
    run = functools.partial(passes, precision=lax.Precision.HIGHEST, kernel=True)
    found = jax.jit(functools.partial(run, interpret=pltpu.InterpretParams(uninitialized_memory="nan")))(*arguments)
    for got, want in zip(found, fast_jit(run)(*arguments)):
        assert relative_error(got, want) < 2e-6


@pytest.mark.slow
def test_transformations_agree_with_the_plain_gradient():
    inputs = of_delta_rule.sample(steps=21, decay="head")
    reset, cotangents = of_delta_rule.marks(inputs, (5,), ()), of_delta_rule.cotangents_for(inputs)
    forms.assert_transformations_agree(of_delta_rule, FORM, inputs, reset, cotangents, TOLERANCE)


# ---- choosing it, and lowering it for a TPU


def test_none_is_the_kernel_on_a_tpu_and_never_on_a_cpu():
    inputs = of_delta_rule.sample(steps=37, decay="head")

    def kernels_in(device, **options):
        with compile_for(device):
            return str(jax.make_jaxpr(lambda x: delta_rule(**x, **options))(inputs)).count("pallas_call")

    assert kernels_in("tpu") == 1 and kernels_in("cpu") == 0
    assert kernels_in("tpu", implementation="chunked") == 0
    one = {name: x if name == "state" else x[:, :1] for name, x in inputs.items()}
    with compile_for("tpu"):
        assert "pallas_call" not in str(jax.make_jaxpr(lambda: delta_rule(**one))())


def test_a_state_too_large_for_vmem_is_refused_by_name_and_left_to_xla_by_default():
    inputs = of_delta_rule.sample(steps=2, batch=1, heads=1, channels=4096, width=512)
    with kernels_of("tpu"):
        with pytest.raises(NotImplementedError, match=r"no Pallas kernel for this call: a state of 4096 x 512 needs \d+ MiB"):
            delta_rule(**inputs, implementation="pallas")
        assert "pallas_call" not in str(jax.make_jaxpr(lambda x: delta_rule(**x))(inputs))


SIZES = {  # op, G, H, K, V, decays, chunk size
    "Gated DeltaNet": (delta_rule, 8, 16, 128, 128, {"log_decay": 1}, 64),
    "KDA": (delta_rule, 4, 4, 64, 64, {"log_decay": 64}, 64),
    "DFW": (gated_linear_attention, 4, 4, 64, 128, {"log_decay": 64, "value_log_decay": 128}, None),
}


@pytest.mark.parametrize("model, dtype", [*((model, "bfloat16") for model in SIZES), ("Gated DeltaNet", "float32")])
def test_lowers_for_a_tpu(model, dtype):
    op, groups, heads, channels, width, decays, chunk_size = SIZES[model]
    of_heads = decays | ({"beta": None} if op is delta_rule else {})
    sizes = dict(groups=groups, heads=heads, channels=channels, width=width, dtype=dtype)
    exported = lower_gradients_for_tpu(op, of_heads=of_heads, chunk_size=chunk_size, **sizes)
    assert exported.mlir_module().count("tpu_custom_call") == 2


SWEEP = {
    "steps": st.integers(1, 20),
    "chunk_size": st.integers(1, 9),
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
def test_a_sweep_of_small_shapes(steps, chunk_size, groups, repeats, marked, seed, **signature):
    inputs = of_delta_rule.sample(steps=steps, groups=groups, heads=groups * repeats, low=-20.0, seed=seed, **signature)
    reset = np.random.default_rng(seed).random((2, steps)) < 0.2 if marked else None

    @fast_jit
    def compute(inputs, reset, cotangents):
        outputs, pull = jax.vjp(lambda x: delta_rule(**x, reset=reset, implementation="pallas", chunk_size=chunk_size), inputs)
        return outputs, pull(cotangents)[0]

    with kernels_of("tpu"):
        found = of_delta_rule.errors(FORM, inputs, reset, compute)
    assert max(found.values()) < 1e-5, found
