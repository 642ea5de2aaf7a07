"""What is drawn: the distribution that the options say, of ids that are tokens, at every temperature there is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.decoding.sampling import Sampler, Sampling, sample
from seqmodels.errors import UserError

LOGITS = np.log([0.2, 0.5, 0.3])
draw = jax.jit(sample)


def draws(logits, count=4000, is_token=None, **options):
    """How often each id is drawn."""
    keys = jax.random.split(jax.random.key(0), count)
    logits = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    return (
        np.bincount(draw(logits, keys, Sampling(**{"temperature": 1.0, **options}), is_token), minlength=logits.shape[-1]) / count
    )


def test_samples_follow_softmax_at_the_temperature():
    np.testing.assert_allclose(draws(LOGITS), [0.2, 0.5, 0.3], atol=0.03)
    squared = np.array([0.04, 0.25, 0.09])
    np.testing.assert_allclose(draws(LOGITS, temperature=0.5), squared / squared.sum(), atol=0.03)


def test_top_k_keeps_the_k_likeliest():
    np.testing.assert_allclose(draws(LOGITS, top_k=2), [0, 5 / 8, 3 / 8], atol=0.03)
    np.testing.assert_allclose(draws(LOGITS, top_k=9), [0.2, 0.5, 0.3], atol=0.03)


def test_top_p_keeps_the_fewest_that_reach_p():
    np.testing.assert_allclose(draws(LOGITS, top_p=0.6), [0, 5 / 8, 3 / 8], atol=0.03)
    np.testing.assert_allclose(draws(LOGITS, top_p=0.4), [0, 1, 0])
    np.testing.assert_allclose(draws(LOGITS, top_p=1.0), [0.2, 0.5, 0.3], atol=0.03)


def test_min_p_keeps_what_is_near_the_likeliest():
    np.testing.assert_allclose(draws(LOGITS, min_p=0.5), [0, 5 / 8, 3 / 8], atol=0.03)
    np.testing.assert_allclose(draws(LOGITS, min_p=1.0), [0, 1, 0])
    np.testing.assert_allclose(draws(LOGITS, min_p=0.3), [0.2, 0.5, 0.3], atol=0.03)
    # of [4, 25, 9] / 38 at temperature 1/2, 9 / 25 is left in and 4 / 25 is not
    np.testing.assert_allclose(draws(LOGITS, min_p=0.3, temperature=0.5), [0, 25 / 34, 9 / 34], atol=0.03)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_of_equal_logits_no_more_are_kept_than_asked_for(k):
    assert (draws(np.zeros(8), 500, top_k=k) > 0).sum() == k
    assert (draws([1.0, 0, 0, 0, 0, 0, 0, 2.0], 500, top_k=k)[[7, 0]][: min(k, 2)] > 0).all()
    assert (draws(np.zeros(8), 500, top_p=k / 8) > 0).sum() == k


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-40, 1.2e-38, 1e-20, 1e-9])
@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_small_temperatures_are_greedy_in_the_limit(temperature, scale):
    for options in ({}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}):
        np.testing.assert_array_equal(draws(scale * LOGITS, 50, temperature=temperature, **options), [0, 1, 0])


@pytest.mark.parametrize("temperature", [1e10, 3e38])
def test_large_temperatures_are_uniform_in_the_limit(temperature):
    np.testing.assert_allclose(draws(LOGITS, temperature=temperature), np.full(3, 1 / 3), atol=0.03)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 1e10}]
)
def test_only_ids_that_are_tokens_are_drawn(options):
    """Whatever an untrained row says; the others are drawn as if it were not there."""
    is_token = np.array([True, False, True, False])
    shares = draws([0.0, 50.0, -1.0, 60.0], 500, is_token=is_token, **options)
    assert shares[[1, 3]].sum() == 0
    alone = draws([0.0, -np.inf, -1.0, -np.inf], 500, **options)
    np.testing.assert_array_equal(shares, alone)


NOT_FINITE = {
    "nan": [np.nan] * 4, "one nan": [0, np.nan, 1, 0], "inf": [0, 0, np.inf, np.inf], "none": [-np.inf] * 4,
    "tokens impossible": [3, -np.inf, 3, -np.inf], "inf beside nan": [np.inf, np.inf, np.nan, np.nan],
    "least": [-3e38, -3e38, 3e38, -3.3e38],
}  # fmt: skip


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0.1}]
)
def test_ids_that_are_no_tokens_are_not_drawn_by_a_model_that_has_diverged(options):
    is_token = np.array([False, True, False, True])
    for name, logits in NOT_FINITE.items():
        assert draws(logits, 500, is_token=is_token, **options)[[0, 2]].sum() == 0, name


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 0.5])
def test_a_quotient_beyond_float32_leaves_the_likeliest(temperature):
    for logits in ([2e38, 3e38, 1e38], [-3e38, -1e38, -2e38]):
        for options in ({}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}):
            np.testing.assert_array_equal(draws(logits, 50, temperature=temperature, **options), [0, 1, 0])


def test_a_temperature_may_be_a_whole_number_of_any_size():
    assert draws(LOGITS, 50, temperature=2**33).sum() == 1
    assert [type(Sampling(temperature=value).temperature) for value in (1, np.float32(1), np.int64(1))] == [float] * 3


@pytest.mark.parametrize(
    "mistake",
    [
        dict(temperature=-1), dict(temperature=float("nan")), dict(temperature=float("inf")), dict(top_k=0), dict(top_p=0.0),
        dict(top_p=float("nan")), dict(min_p=1.5), dict(temperature=1e308), dict(top_k=1.5), dict(temperature="1"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(mistake):
    (name,) = mistake
    with pytest.raises(UserError, match=name):
        Sampling(**mistake)


def test_other_values_of_an_option_compile_nothing_new():
    logits, key = jnp.zeros((2, 5)), jax.random.key(0)
    step = jax.jit(lambda sampler, logits, index: sampler(logits, index))
    step(Sampler(Sampling(0.5, top_p=0.9), key), logits, 0)
    step(Sampler(Sampling(0.0), key), logits, 0)
    with jax.no_tracing():
        step(Sampler(Sampling(2.0, top_p=0.1), key), logits, 3)
        step(Sampler(Sampling(0.0, top_k=4), key), logits, 3)


def test_a_row_depends_on_its_own_place_alone():
    logits = jax.random.normal(jax.random.key(1), (6, 40))
    sampling, key = Sampling(1.0), jax.random.key(0)
    whole = Sampler(sampling, key)(logits, 3)
    np.testing.assert_array_equal(Sampler(sampling, key, first_row=2)(logits[2:4], 3), whole[2:4])
    assert (Sampler(sampling, key)(logits, 4) != whole).any()
