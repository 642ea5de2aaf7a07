"""Decoding is the model that was trained: greedy stepping = argmax of the full forward pass, padded or not."""

import functools

import jax
import numpy as np
import pytest

from seqmodels import model
from seqmodels.decoding import session
from seqmodels.decoding.generate import generate, pad_prompts
from seqmodels.decoding.sampling import Sampler, Sampling
from seqmodels.errors import UserError
from tests.configs import layer_configs
from tests.products import rest_in_tools
from tests.programs import fast_jit


def test_prompts_are_padded_on_the_left_and_reset_at_their_first_token():
    tokens, reset = pad_prompts([[5, 6, 7], [8]])
    np.testing.assert_array_equal(tokens, [[0, 5, 6, 7], [0, 0, 0, 8]])
    np.testing.assert_array_equal(reset, [[False, True, False, False], [False, False, False, True]])


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_an_empty_prompt_is_a_mistake(prompts):
    with pytest.raises(UserError, match="at least one"):
        pad_prompts(prompts)


PATTERNS = ("attention mlp", "linear_attention mlp", "linear_attention attention mlp", "rwkv6 rwkv_channel_mix")
PROMPTS = ([5], [1, 2, 3, 4, 5, 6, 7], [int(n) for n in np.random.default_rng(0).integers(0, 50, 23)])
VOCABULARY = 50


@functools.cache
def small_network(pattern, compute_dtype="float32", repeats=2, scale=3):
    """(graphdef, params) of a model of width 32 whose next token depends on what it read."""
    config = model.ModelConfig(
        d_model=32, pattern=pattern, repeats=repeats, tie_embeddings=False, embedding_norm=False, branch_rms=None,
        compute_dtype=compute_dtype, **layer_configs(pattern),
    )  # fmt: skip

    def init(key):
        params = model.init_params(config, VOCABULARY, key)
        return jax.tree.map(lambda kernel: scale * kernel, params)  # decided logits: no near-ties

    return model.graphdef(config, VOCABULARY), fast_jit(init)(jax.random.key(1))


@pytest.fixture(scope="module")
def network():
    return small_network("linear_attention attention mlp")


def sampler(seed=0, ends=(), is_token=None, first_row=0, **sampling):
    return Sampler(Sampling(**{"temperature": 1.0, **sampling}), jax.random.key(seed), ends, is_token, first_row)


def stream(graphdef, params, prompt, draw, **options):
    state = session.read(graphdef, params, prompt, params_fingerprint="")
    return session.stream(graphdef, params, state, draw, **options)


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


@pytest.mark.parametrize("pattern", rest_in_tools(PATTERNS, ("attention mlp",)))
def test_greedy_stepping_is_the_argmax_of_full_forward_passes(pattern):
    network = small_network(pattern)
    draw = sampler(temperature=0.0)
    expected = greedy_by_full_passes(network, 12)
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)  # the prompt matters
    assert generate(*network, PROMPTS, draw, max_tokens=12) == expected  # padded to one length
    assert generate(*network, PROMPTS[1:2], draw, max_tokens=12) == expected[1:2]  # alone
    assert list(stream(*network, PROMPTS[1], draw, max_tokens=12)) == expected[1]


@pytest.mark.parametrize("count", rest_in_tools((1, 2), (2,)))
def test_end_of_text_ends_a_row_and_no_other(network, count):
    whole = generate(*network, PROMPTS, sampler(temperature=0.0), max_tokens=12)
    ends = (whole[1][4], whole[2][2])[:count]
    cut = [row[: min([row.index(end) for end in ends if end in row], default=12)] for row in whole]
    assert len(cut[1]) <= 4
    draw = sampler(temperature=0.0, ends=ends)
    assert generate(*network, PROMPTS, draw, max_tokens=12) == cut
    assert list(stream(*network, PROMPTS[1], draw, max_tokens=12)) == whole[1][: len(cut[1]) + 1]


@pytest.mark.tools
def test_ids_that_are_no_tokens_are_not_written(network):
    is_token = np.arange(VOCABULARY) % 3 > 0
    for temperature in (0.0, 1.0, 1e6):
        draw = sampler(temperature=temperature, is_token=is_token)
        written = generate(*network, PROMPTS, draw, max_tokens=12)
        assert is_token[np.array(written)].all()
        assert list(stream(*network, PROMPTS[0], draw, max_tokens=12)) == written[0]


def test_the_seed_decides_and_streaming_agrees(network):
    first, again, other = (generate(*network, PROMPTS, sampler(seed, top_k=20, top_p=0.95), max_tokens=12) for seed in (0, 0, 1))
    assert first == again and first != other
    assert list(stream(*network, PROMPTS[0], sampler(top_k=20, top_p=0.95), max_tokens=12)) == first[0]


@pytest.mark.tools
def test_a_list_may_be_decoded_in_parts(network):
    whole = generate(*network, PROMPTS, sampler(), max_tokens=12)
    assert generate(*network, PROMPTS[2:], sampler(first_row=2), max_tokens=12) == whole[2:]
    assert generate(*network, PROMPTS[2:], sampler(), max_tokens=12) != whole[2:]  # the place of a row decides, too


def test_one_compilation_serves_every_prompt_of_a_length_class_and_every_temperature(network):
    def run(prompt, temperature):
        generate(*network, [prompt], sampler(temperature=temperature), max_tokens=3)

    run([1, 2, 3], 0.5)
    with jax.no_tracing():
        run([4, 3, 2, 1], 2.0)


def test_a_negative_count_is_named():
    with pytest.raises(UserError, match="max_tokens"):
        generate(None, None, [[1]], sampler(), max_tokens=-1)
    with pytest.raises(UserError, match="max_tokens"):
        session.stream(None, None, None, sampler(), max_tokens=-1)
    with pytest.raises(UserError, match="max_tokens"):
        session.continue_from(None, None, None, sampler(), max_tokens=-1)
