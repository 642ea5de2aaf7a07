"""Decoding is the model that was trained, for every mixer: what it gives token by token is what one full pass gives.

Prompts of very different lengths share a batch, padded on the left; the full pass has each of them alone, from its first token.
"""

import jax
import numpy as np
import pytest

from seqmodels import mixers, model
from seqmodels.decoding import generate
from seqmodels.decoding.sampling import Sampler, Sampling
from tests.decoding.test_generate import VOCABULARY, small_network

LENGTHS = (1, 7, 63, 200)
NEW = 8  # tokens decoded
BOUND = 1e-4  # of a log-probability, in float32
# Mixers by themselves compile faster; of RWKV-6 the channel mix has a state, too.
PATTERNS = {name: name for name in mixers.names()} | {
    "rwkv6": "rwkv6 rwkv_channel_mix",
    "hybrid": "mamba2 attention gated_deltanet mlp",
}
# What carries a state through a model is the same code for all, and that a mixer decodes is a law of its contract: a nonlinear
# recurrence, a channel layer's state and a cache are in `make test`, the others are tests of tools.
FIRST = ("lstm", "rwkv6", "attention")
NAMES = [*FIRST, *(pytest.param(name, marks=pytest.mark.tools) for name in PATTERNS if name not in FIRST)]
PROMPTS = [[int(n) for n in np.random.default_rng(length).integers(0, VOCABULARY, length)] for length in LENGTHS]
GREEDY = Sampler(Sampling(temperature=0.0), jax.random.key(0))


def decided(pattern):
    """(graphdef, params) of one repeat whose logits lie apart and depend on what was read."""
    graphdef, params = small_network(pattern, repeats=1, scale=1)
    return graphdef, params | {"embedding": 50 * params["embedding"], "output_kernel": 20 * params["output_kernel"]}


def decode(network, prompts):
    """Greedily: (tokens [B, NEW], the log-probabilities [B, NEW, L] they were chosen by)."""
    graphdef, params = network
    tokens, reset = generate.pad_prompts(prompts)
    logits, state = generate.prefill(graphdef, params, tokens, reset, capacity=tokens.shape[1] + NEW)
    chosen, log_probabilities = [], []
    for _ in range(NEW):
        log_probabilities.append(jax.nn.log_softmax(logits))
        token, _, logits, state = generate.decode(graphdef, params, GREEDY, logits, state, max_tokens=1)
        chosen.append(token[:, 0])
    return np.stack(chosen, axis=1), np.stack(log_probabilities, axis=1)


def full_pass(network, texts):
    """Log-probabilities after the prompt and after each new token but the last: [B, NEW, L]. Texts are padded at the end."""
    graphdef, params = network
    tokens = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    logits = _forward(graphdef, params, tokens)
    return np.stack([jax.nn.log_softmax(row[len(text) - NEW - 1 : len(text) - 1]) for row, text in zip(logits, texts)])


_forward = jax.jit(lambda graphdef, params, tokens: model.merge(graphdef, params)(tokens)[0], static_argnums=0)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_is_the_full_pass(name):
    network = decided(PATTERNS[name])
    tokens, stepped = decode(network, PROMPTS)
    texts = [prompt + row.tolist() for prompt, row in zip(PROMPTS, tokens)]
    whole = full_pass(network, texts)
    worst = np.abs(stepped - whole).max()
    assert worst <= BOUND, f"worst difference of a log-probability {worst:.1e}"
    best = np.sort(whole, axis=-1)
    tied = best[..., -1] - best[..., -2] < 2 * BOUND
    assert tied.mean() < 0.1
    np.testing.assert_array_equal(tokens[~tied], whole.argmax(-1)[~tied])
    # It is the text that decides, not only its last token: otherwise nothing was shown above.
    others = [[(token + 1) % VOCABULARY for token in text[: -NEW - 1]] + text[-NEW - 1 :] for text in texts]
    assert np.abs(full_pass(network, others) - whole)[1:, 0].max() > 100 * BOUND


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_a_prompt_alone_is_a_prompt_in_a_padded_batch(name):
    network = decided(PATTERNS[name])
    tokens, together = decode(network, PROMPTS)
    written = generate.generate(*network, PROMPTS, GREEDY, max_tokens=NEW)
    assert written == tokens.tolist()
    for row, prompt in enumerate(PROMPTS):
        alone_tokens, alone = decode(network, [prompt])
        decided_so_far = np.cumprod(alone_tokens[0] == tokens[row]).astype(bool)
        compared = np.concatenate([[True], decided_so_far[:-1]])  # the same text until here
        assert np.abs(alone[0] - together[row])[compared].max() <= BOUND
        best = np.sort(alone[0], axis=-1)
        tied = best[:, -1] - best[:, -2] < 2 * BOUND
        assert decided_so_far.all() or tied[compared].any()
