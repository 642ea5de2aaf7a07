"""A Llama checkpoint, as transformers saves it, loaded into our model: the same logits, whole and token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.mixers.goldens import checkpoint_model

llama = functools.cache(functools.partial(checkpoint_model, "hf/llama"))  # () -> (model, golden arrays)


def assert_close(logits, expected):
    worst = np.abs(np.asarray(logits, np.float64) - expected).max() / np.abs(expected).max()
    assert worst <= 5e-5, f"relative error {worst:.1e}"


def test_logits_of_the_whole_text():
    network, arrays = llama()
    tokens = jnp.asarray(arrays["input_ids"], jnp.int32)
    logits, _ = jax.jit(network)(tokens)
    assert_close(logits, arrays["logits"])
    assert_close(logits, arrays["logits_f64run"])


def test_logits_token_by_token():
    network, arrays = llama()
    tokens = jnp.asarray(arrays["input_ids"], jnp.int32)

    def step(state, token):
        logits, state = network(token[:, None], state)
        return state, logits[:, 0]

    _, logits = jax.jit(lambda state: jax.lax.scan(step, state, tokens.T))(network.init_state(*tokens.shape))
    assert_close(jnp.moveaxis(logits, 0, 1), arrays["logits_step"])


def test_a_long_text_after_a_prefill():
    """Twenty tokens at once, then the rest on top of the cache."""
    network, arrays = llama()
    tokens = jnp.asarray(arrays["input_ids"], jnp.int32)
    call = jax.jit(network)
    first, state = call(tokens[:, :20], network.init_state(*tokens.shape))
    second, _ = call(tokens[:, 20:], state)
    assert_close(jnp.concatenate([first, second], axis=1), arrays["logits"])
