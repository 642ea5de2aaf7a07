"""The laws themselves: correct mixers pass them, and each way of being broken is caught by the law that is about it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.contract import laws, mutants

D_MODEL = 16


def build(mixer, fault, implementation, dtype):
    options = {"compute_dtype": dtype} if mixer is mutants.HistoryMixer else {}
    module = mixer(mutants.Config(implementation, fault), D_MODEL, rngs=nnx.Rngs(params=0), **options)
    return laws.Subject(module, laws.normal_inputs(D_MODEL))


def case(mixer, fault=None, implementation="chunked"):
    """As `make test` compares the fewest: at one length."""
    one_length = (laws.LONGEST,)
    build_one = functools.partial(build, mixer, fault)
    return laws.Case("mutant", build_one, implementation, lengths=one_length, gradient_lengths=one_length)


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.name)
@pytest.mark.parametrize(("mixer", "implementation"), [(mutants.DecayMixer, "chunked"), (mutants.HistoryMixer, "recurrent")])
def test_a_correct_mixer_passes(mixer, implementation, law):
    assert law.measure(case(mixer, implementation=implementation)) <= law.bound


@pytest.mark.parametrize(
    ("mixer", "fault", "law"),
    [
        (mutants.DecayMixer, "the final state is one step old", "split"),
        (mutants.DecayMixer, "the convolution's tail is not carried", "split"),
        (mutants.DecayMixer, "no state is not the empty state", "split"),
        (mutants.DecayMixer, "the state changes its dtype", "split"),
        (mutants.HistoryMixer, "the last value is not kept", "split"),
        (mutants.DecayMixer, "the convolution's tail is not carried", "stepwise"),
        (mutants.DecayMixer, "one form is a little off", "implementations"),
        (mutants.DecayMixer, "one form forgets the reset", "implementations"),
        (mutants.DecayMixer, "a gradient is wrong in one form", "gradients"),
        (mutants.DecayMixer, "a gradient path is cut in one form", "gradients"),
        (mutants.DecayMixer, "reads the future, a little", "causality"),
        (mutants.DecayMixer, "the recurrence ignores reset", "causality"),
        (mutants.DecayMixer, "the convolution ignores reset", "reset"),
        (mutants.DecayMixer, "the recurrence ignores reset", "reset"),
        (mutants.DecayMixer, "reset multiplies instead of selecting", "reset"),
        (mutants.DecayMixer, "swallows NaN", "reset"),
        (mutants.HistoryMixer, "the cache ignores reset", "reset"),
        (mutants.DecayMixer, "mixes rows", "rows"),
        (mutants.DecayMixer, "the convolution ignores reset", "left_padding"),
        (mutants.HistoryMixer, "the cache ignores reset", "left_padding"),
        (mutants.DecayMixer, "the state is bfloat16", "bfloat16"),
        (mutants.DecayMixer, "accumulates in bfloat16", "bfloat16"),
        (mutants.DecayMixer, "outputs are float32", "bfloat16"),
        (mutants.DecayMixer, "overflows when gates close", "strong"),
        (mutants.DecayMixer, "a scalar in the state", "state_size"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else value.__name__,
)
def test_a_broken_mixer_is_caught(mixer, fault, law):
    (law,) = [each for each in laws.LAWS if each.name == law]
    broken = case(mixer, fault, "chunked" if mixer is mutants.DecayMixer else "recurrent")
    try:
        found = law.measure(broken)
    except laws.ContractBroken:
        return
    assert found > 2 * law.bound


def test_a_refusal_needs_words():
    assert laws.refusal(case(mutants.DecayMixer, implementation="pallas")) == "no pallas form"
    assert laws.refusal(case(mutants.DecayMixer, implementation="chunked")) is None
    with pytest.raises(laws.ContractBroken):
        laws.refusal(case(mutants.DecayMixer, "refuses without a word", "pallas"))


def test_the_same_program_is_compiled_once_and_no_other_is_taken_for_it():
    def program(value, argument=0, scale=1.0):
        table = np.arange(300, dtype=np.float32) + value  # not one number, which a text may say in short
        return laws.SharedJit(lambda *x: x[argument] * table * scale)

    x = np.ones(300, np.float32), np.full(300, 2, np.float32)
    first = program(3)
    assert first(*x)[0] == 3 and len(first._programs) == 1
    with jax.no_tracing():
        assert first(*x)[0] == 3
    again, other_value, other_argument = program(3), program(4), program(3, argument=1)
    assert [each(*x)[0] for each in (again, other_value, other_argument)] == [3, 4, 6]
    (one,), (two,) = first._programs.values(), again._programs.values()
    assert one is two
    strong, weak = laws.SharedJit(lambda x: np.float32(1)), laws.SharedJit(lambda x: 1.0)
    assert [each(x[0]).weak_type for each in (strong, weak)] == [False, True]


def test_error_is_relative_to_the_leaf_and_never_forgives_nan():
    want = {"large": jnp.array([100.0, 1.0]), "small": jnp.array([0.5])}
    assert laws.error(want, want) == 0.0
    assert laws.error({**want, "large": jnp.array([101.0, 1.0])}, want) == pytest.approx(0.01)
    assert laws.error({**want, "small": jnp.array([0.6])}, want) == pytest.approx(0.1)  # against 1% of 100
    assert laws.error({**want, "small": jnp.array([np.nan])}, want) == math.inf
    assert laws.error(jnp.array([1, 2]), jnp.array([1, 3])) == math.inf
    with pytest.raises(laws.ContractBroken):
        laws.error(jnp.zeros((2,)), jnp.zeros((1, 2)))
