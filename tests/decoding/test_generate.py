"""Decoding is the model that was trained: greedy stepping = argmax of the full forward pass, padded or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import mixers, model
from seqmodels.decoding import session
from seqmodels.decoding.generate import generate, pad_prompts, sample
from seqmodels.errors import UserError


def test_prompts_are_padded_on_the_left_and_reset_at_their_first_token():
    tokens, reset = pad_prompts([[5, 6, 7], [8]])
    np.testing.assert_array_equal(tokens, [[0, 5, 6, 7], [0, 0, 0, 8]])
    np.testing.assert_array_equal(reset, [[False, True, False, False], [False, False, False, True]])


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_an_empty_prompt_is_a_mistake(prompts):
    with pytest.raises(UserError, match="at least one"):
        pad_prompts(prompts)


def draws(logits, count=4000, **options):
    keys = jax.random.split(jax.random.key(0), count)
    logits = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    return np.bincount(sample(logits, keys, greedy=False, **options), minlength=logits.shape[-1]) / count


def test_samples_follow_softmax_at_the_temperature():
    logits = np.log([0.5, 0.3, 0.2])
    np.testing.assert_allclose(draws(logits), [0.5, 0.3, 0.2], atol=0.03)
    squared = np.array([0.25, 0.09, 0.04])
    np.testing.assert_allclose(draws(logits, temperature=0.5), squared / squared.sum(), atol=0.03)


def test_top_k_keeps_the_k_likeliest():
    np.testing.assert_allclose(draws(np.log([0.2, 0.5, 0.3]), top_k=2), [0, 5 / 8, 3 / 8], atol=0.03)
    np.testing.assert_allclose(draws(np.log([0.2, 0.5, 0.3]), top_k=9), [0.2, 0.5, 0.3], atol=0.03)


def test_top_p_keeps_the_fewest_that_reach_p():
    np.testing.assert_allclose(draws(np.log([0.2, 0.5, 0.3]), top_p=0.6), [0, 5 / 8, 3 / 8], atol=0.03)
    np.testing.assert_allclose(draws(np.log([0.2, 0.5, 0.3]), top_p=0.4), [0, 1, 0])
    np.testing.assert_allclose(draws(np.log([0.2, 0.5, 0.3]), top_p=1.0), [0.2, 0.5, 0.3], atol=0.03)


def test_min_p_keeps_what_is_near_the_likeliest():
    np.testing.assert_allclose(draws(np.log([0.2, 0.5, 0.3]), min_p=0.5), [0, 5 / 8, 3 / 8], atol=0.03)
    np.testing.assert_allclose(draws(np.log([0.2, 0.5, 0.3]), min_p=1.0), [0, 1, 0])
    np.testing.assert_allclose(draws(np.log([0.2, 0.5, 0.3]), min_p=0.3), [0.2, 0.5, 0.3], atol=0.03)
    # of [4, 25, 9] / 38 at temperature 1/2, 9 / 25 is left in and 4 / 25 is not
    np.testing.assert_allclose(draws(np.log([0.2, 0.5, 0.3]), min_p=0.3, temperature=0.5), [0, 25 / 34, 9 / 34], atol=0.03)


PATTERNS = ("attention mlp", "linear_attention mlp", "linear_attention attention mlp", "rwkv6 mlp")
PROMPTS = ([5], [1, 2, 3, 4, 5, 6, 7], [int(n) for n in np.random.default_rng(0).integers(0, 50, 23)])
VOCABULARY = 50


def small_network(pattern, compute_dtype="float32", repeats=2, scale=3):
    """(graphdef, params) of a model of width 32 whose next token depends on what it read."""
    options = {name: mixers.load(name).Config() for name in model.mixers_in_pattern(pattern)}
    config = model.ModelConfig(
        d_model=32, pattern=pattern, repeats=repeats, mixers=tuple(options.items()), mlp_hidden=None,
        mlp_kind="rwkv6" if "rwkv6" in pattern else "gated",
        mlp_activation="silu", tie_embeddings=False, vocab_size=None, embedding_norm=False, norm="rms",
        logit_cap=None, readout="each", norm_eps=1e-5, dropout=0.0, remat=False, compute_dtype=compute_dtype,
    )  # fmt: skip
    # Run once, so that optimising it would take longer than it saves.
    init = jax.jit(model.init_params, static_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": 0})
    params = init(config, VOCABULARY, jax.random.key(1))
    params = jax.tree.map(lambda kernel: scale * kernel, params)  # decided logits: no near-ties
    return model.graphdef(config, VOCABULARY), params


@pytest.fixture(scope="module")
def network():
    return small_network("linear_attention attention mlp")


def stream(graphdef, params, prompt, **options):
    state = session.read(graphdef, params, prompt, params_fingerprint="")
    return session.stream(graphdef, params, state, **options)


def greedy_by_full_passes(network, count):
    """For each prompt, `count` times the argmax of one full forward pass over everything so far."""
    graphdef, params = network
    length = max(map(len, PROMPTS)) + count
    forward = jax.jit(lambda params, tokens: model.merge(graphdef, params)(tokens)[0])
    continuations = []
    for prompt in PROMPTS:
        tokens = np.zeros((1, length), np.int32)  # what comes later changes nothing before it
        tokens[0, : len(prompt)] = prompt
        for position in range(len(prompt), len(prompt) + count):
            tokens[0, position] = np.argmax(forward(params, tokens)[0, position - 1])
        continuations.append(tokens[0, len(prompt) : len(prompt) + count].tolist())
    return continuations


@pytest.mark.parametrize("pattern", PATTERNS)
def test_greedy_stepping_is_the_argmax_of_full_forward_passes(pattern):
    network = small_network(pattern)
    options = dict(max_tokens=12, temperature=0, key=jax.random.key(0))
    expected = greedy_by_full_passes(network, 12)
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)  # the prompt matters
    assert generate(*network, PROMPTS, **options) == expected  # padded to one length
    assert generate(*network, PROMPTS[1:2], **options) == expected[1:2]  # alone
    assert list(stream(*network, PROMPTS[1], **options)) == expected[1]


def test_end_of_text_ends_a_row_and_no_other(network):
    options = dict(max_tokens=12, temperature=0, key=jax.random.key(0))
    whole = generate(*network, PROMPTS, **options)
    stop = whole[1][4]
    cut = [row[: row.index(stop)] if stop in row else row for row in whole]
    assert len(cut[1]) <= 4
    assert generate(*network, PROMPTS, end_of_text=stop, **options) == cut
    assert list(stream(*network, PROMPTS[1], end_of_text=stop, **options)) == cut[1]


def test_the_seed_decides_and_streaming_agrees(network):
    options = dict(max_tokens=12, temperature=1.0, top_k=20, top_p=0.95)
    first = generate(*network, PROMPTS, key=jax.random.key(0), **options)
    assert first == generate(*network, PROMPTS, key=jax.random.key(0), **options)
    assert first != generate(*network, PROMPTS, key=jax.random.key(1), **options)
    assert list(stream(*network, PROMPTS[0], key=jax.random.key(0), **options)) == first[0]


def test_a_list_may_be_decoded_in_parts(network):
    options = dict(max_tokens=12, temperature=1.0, key=jax.random.key(0))
    whole = generate(*network, PROMPTS, **options)
    assert generate(*network, PROMPTS[2:], first_row=2, **options) == whole[2:]
    assert generate(*network, PROMPTS[2:], **options) != whole[2:]  # the place of a row decides, too


def test_one_compilation_serves_every_prompt_of_a_length_class_and_every_temperature(network):
    def run(prompt, temperature):
        generate(*network, [prompt], max_tokens=3, temperature=temperature, key=jax.random.key(0))

    run([1, 2, 3], 0.5)
    with jax.no_tracing():
        run([4, 3, 2, 1], 2.0)


@pytest.mark.parametrize(
    "mistake",
    [
        dict(temperature=-1), dict(temperature=float("nan")), dict(top_k=0), dict(top_p=0.0), dict(min_p=1.5),
        dict(max_tokens=-1),
    ],
)
def test_options_out_of_range_are_named(mistake):
    (name,) = mistake
    options = dict(max_tokens=3, key=jax.random.key(0)) | mistake
    with pytest.raises(UserError, match=name):
        generate(None, None, [[1]], **options)
    with pytest.raises(UserError, match=name):
        session.stream(None, None, None, **options)
    with pytest.raises(UserError, match=name):
        session.continue_from(None, None, None, **options)
