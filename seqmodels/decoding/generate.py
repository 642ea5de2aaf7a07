"""Decoding from a language model: one prefill call, then one-token calls compiled once.

The model that decodes is the model that was trained: the same `__call__`, with a state. Prompts of unequal
length share a batch by left padding, with `reset` at each prompt's first token, so that nothing a row was padded
with reaches it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from seqmodels import model
from seqmodels.errors import UserError

Params = Any  # the pure dict of arrays that setup.init() and a checkpoint hold


def generate(
    graphdef: nnx.GraphDef,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    key: Key[Array, ""],
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    end_of_text: int | None = None,
    first_row: int = 0,
) -> list[list[int]]:
    """Continue each prompt by up to `max_tokens` tokens; a continuation ends before its `end_of_text`.

    Args:
        prompts: token ids, at least one per prompt; lengths may differ.
        temperature: divides the logits before sampling; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the fewest likeliest tokens whose probability reaches p (Holtzman et al. 2020,
            section 3.1).
        min_p: sample among the tokens at least p times as probable as the likeliest (Nguyen et al. 2024,
            arXiv 2407.01082, section 3).
        key: a row's sample depends on the key, its place in the batch and nothing of the other rows.
        first_row: place of the first prompt, where the batch is a part of a longer list.

    Compiles once per (batch size, padded prompt length, max_tokens): prompts are padded to a power of two. The
    state's capacity is sized here, so that no length is too long for it.

    Raises:
        UserError: no prompt, an empty prompt, or a sampling option out of range.
    """
    sampling = check_sampling(max_tokens, temperature, top_k, top_p, min_p)
    tokens, reset = pad_prompts(prompts)
    if max_tokens == 0:
        return [[] for _ in prompts]
    logits, state = prefill(graphdef, params, tokens, reset, capacity=tokens.shape[1] + max_tokens)
    stop = -1 if end_of_text is None else end_of_text
    new_tokens, lengths, _, _ = decode(
        graphdef, params, logits, state, key, stop, max_tokens=max_tokens, first_row=first_row, **sampling
    )
    return [row[:length].tolist() for row, length in zip(np.asarray(new_tokens), np.asarray(lengths))]


def stream(
    graphdef: nnx.GraphDef,
    params: Params,
    logits: Float[Array, "1 L"],
    state: model.UnstackedState,
    *,
    max_tokens: int,
    key: Key[Array, ""],
    end_of_text: int | None,
    first_index: int,
    **sampling: Any,
) -> Iterator[int]:
    """The tokens that `decode` would sample for one row, each as soon as it is known; `end_of_text` is not among them.

    Every token costs a call from the host.

    Args:
        logits, state: from `prefill` or an earlier call; the state is used up.
        first_index: as in `decode`.
        sampling: from `check_sampling`.
    """
    greedy, top_k = sampling.pop("greedy"), sampling.pop("top_k")
    # On the device once, not once a token.
    options = {name: None if value is None else jnp.float32(value) for name, value in sampling.items()}
    advance = stepper(graphdef, greedy, top_k)
    token, index = _sample_at(logits, key, jnp.int32(first_index), greedy=greedy, top_k=top_k, **options)
    for left in reversed(range(max_tokens)):
        # The next call is dispatched before this token is read, so that host and device overlap.
        if left:
            following, index, state = advance(params, token, state, key, index, **options)
        token_id = int(np.asarray(token)[0])
        if token_id == end_of_text:
            return
        yield token_id
        if left:
            token = following


def pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Left-pad prompts to one power-of-two length; `reset` marks each prompt's first token.

    Raises:
        UserError: there is no prompt, or one has no token.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UserError("there is nothing to continue: give at least one prompt, of at least one token each")
    longest = max(len(prompt) for prompt in prompts)
    padded = 1 << (longest - 1).bit_length()
    tokens = np.zeros((len(prompts), padded), np.int32)
    reset = np.zeros((len(prompts), padded), bool)
    for row, prompt in enumerate(prompts):
        first = padded - len(prompt)
        tokens[row, first:] = prompt
        reset[row, first] = True
    return tokens, reset


def sample(
    logits: Float[Array, "B L"],
    keys: Key[Array, "B"],
    *,
    greedy: bool,
    temperature: Float[Array, ""] | float = 1.0,
    top_k: int | None = None,
    top_p: Float[Array, ""] | float | None = None,
    min_p: Float[Array, ""] | float | None = None,
) -> Int[Array, "B"]:
    """One token per row, with a key per row. Temperature first, then top-k, top-p and min-p, each of what is left."""
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth_largest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < kth_largest, -jnp.inf, logits)
    if top_p is not None:
        descending = -jnp.sort(-logits, axis=-1)
        probability = jax.nn.softmax(descending, axis=-1)
        likelier = jnp.cumsum(probability, axis=-1) - probability
        # The likeliest token always stays: nothing is likelier than it.
        smallest_kept = jnp.min(jnp.where(likelier < top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest_kept, -jnp.inf, logits)
    if min_p is not None:
        # A ratio of probabilities is a difference of logits: what the others left out does not matter.
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def check_sampling(
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> dict[str, Any]:
    """Arguments of `sample`, checked: `greedy` and `top_k` are compiled in, the others are not.

    Raises:
        UserError: one is out of range.
    """
    if max_tokens < 0:
        raise UserError(f"max_tokens is {max_tokens}; give 0 or more")
    if not temperature >= 0:
        raise UserError(f"temperature is {temperature}; give 0 (the likeliest token) or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}; give 1 or more")
    for name, probability in (("top_p", top_p), ("min_p", min_p)):
        if probability is not None and not 0 < probability <= 1:
            raise UserError(f"{name} is {probability}; give a probability above 0, at most 1")
    if temperature == 0:
        return dict(greedy=True, temperature=1.0, top_k=None, top_p=None, min_p=None)
    return dict(greedy=False, temperature=float(temperature), top_k=top_k, top_p=top_p, min_p=min_p)


def _row_keys(key, batch_size, index, first_row):
    """A key per row for the token at `index`; a row's key does not depend on the batch size."""
    key = jax.random.fold_in(key, index)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first_row + jnp.arange(batch_size))


@functools.lru_cache(maxsize=8)
def stepper(graphdef: nnx.GraphDef, greedy: bool, top_k: int | None) -> Callable:
    """A compiled call for every token of a stream: what the host does between two of them is this call alone.

    Made once for a model, whose structure then is not looked at again: (params, token [B], state, key, index, *, temperature,
    top_p, min_p) -> (the token after it, sampled as the one at ``index``; index + 1; the state). The state passed is used up.
    """

    def advance(params, token, state, key, index, **options):
        logits, state = _next_logits(graphdef, params, token, state)
        return *_sample_at(logits, key, index, greedy=greedy, top_k=top_k, **options), state

    return jax.jit(advance, donate_argnums=2)


@functools.partial(jax.jit, static_argnames=("greedy", "top_k"))
def _sample_at(logits, key, index, **options):
    """The token at a place of the key's sequence, and the next place."""
    return sample(logits, _row_keys(key, logits.shape[0], index, 0), **options), index + 1


@functools.partial(jax.jit, static_argnums=0, static_argnames="capacity")
def prefill(graphdef, params, tokens, reset, *, capacity):
    """Read padded prompts in one call: logits after the last token [B, L], and the state that `decode` goes on from.

    Args:
        tokens, reset: [B, T], as `pad_prompts` makes them.
        capacity: tokens the state can hold, prompt included.
    """
    network = model.merge(graphdef, params)
    hidden, state = network.features(tokens, network.init_state(tokens.shape[0], capacity), reset=reset)
    logits = network.logits(hidden[:, -1])  # of T positions, one is wanted
    return logits, network.unstack_state(state)


def _next_logits(graphdef, params, token, state):
    logits, state = model.merge(graphdef, params)(token[:, None], state)
    return logits[:, 0], state


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_tokens", "greedy", "top_k"))
def decode(
    graphdef, params, logits, state, key, stop, *,
    max_tokens, greedy, temperature, top_k, top_p, min_p, first_index=0, first_row=0,
):  # fmt: skip
    """Sample until every row has met `stop` or `max_tokens`: (tokens [B, max_tokens], lengths [B], logits, state).

    The logits and the state are those after the last token that any row sampled (`stop` included; a row that has met it
    reads on with the others, so that only a batch of one can be continued from them).

    Args:
        logits, state: from `prefill` or an earlier call; the state has room for `max_tokens` more.
        stop: the token that ends a row; -1 for none.
        greedy, temperature, top_k, top_p, min_p: as in `sample`.
        first_index: place of the first token in the key's sequence: how many were sampled by earlier calls.
        first_row: place of the first row, where the batch is a part of a longer list.
    """
    batch_size = logits.shape[0]

    def unfinished(carry):
        index, _, _, _, lengths = carry
        return (index < max_tokens) & jnp.any(lengths == index)

    def one_token(carry):
        index, logits, state, tokens, lengths = carry
        keys = _row_keys(key, batch_size, first_index + index, first_row)
        token = sample(logits, keys, greedy=greedy, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        # A row is alive while its length is the number of steps so far.
        lengths = lengths + ((lengths == index) & (token != stop))
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, index, axis=1)
        logits, state = _next_logits(graphdef, params, token, state)
        return index + 1, logits, state, tokens, lengths

    tokens = jnp.zeros((batch_size, max_tokens), jnp.int32)
    lengths = jnp.zeros(batch_size, jnp.int32)
    carry = (jnp.int32(0), logits, state, tokens, lengths)
    _, logits, state, tokens, lengths = jax.lax.while_loop(unfinished, one_token, carry)
    return tokens, lengths, logits, state
