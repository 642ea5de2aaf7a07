"""Decoding is the model that was trained: greedy stepping = argmax of the full forward pass, padded or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import UserError
from seqmodels.generate import IncrementalText, pad_prompts, sample


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


class ByteTokenizer:
    def decode(self, tokens):
        return bytes(tokens).decode("utf-8", errors="replace")


class WordTokenizer:
    """Drops the space before the first word of a text, as sentencepiece tokenizers do."""

    words = ["Once", "upon", "a", "time"]

    def decode(self, tokens):
        return " ".join(self.words[token] for token in tokens)


def test_streamed_text_never_splits_a_character():
    text = "Zoë ate 3 🍰s."
    stream = IncrementalText(ByteTokenizer())
    pieces = [stream.push(byte) for byte in text.encode()] + [stream.flush()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_streamed_text_shows_what_broke_off():
    stream = IncrementalText(ByteTokenizer())
    assert [stream.push(byte) for byte in "ok🍰".encode()[:4]] == ["o", "k", "", ""]
    assert stream.flush() == "\ufffd"


def test_streamed_text_keeps_the_spaces_between_tokens():
    stream = IncrementalText(WordTokenizer(), context=[0])
    assert [stream.push(token) for token in (1, 2, 3)] == [" upon", " a", " time"]
