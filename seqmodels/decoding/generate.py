"""Decoding from a language model: one prefill call, then one-token calls compiled once.

The model that decodes is the model that was trained: the same `__call__`, with a state. Prompts of unequal
length share a batch by left padding, with `reset` at each prompt's first token, so that nothing a row was padded
with reaches it.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from seqmodels import device_memory, model, ops, ranges
from seqmodels.decoding.sampling import Sampler
from seqmodels.errors import UserError
from seqmodels.ops.placement import BATCH_AXES

Params = Any  # the pure dict of arrays that trainer.init() and a checkpoint hold

_SMALL_CAPACITY: Final = 1 << 14
"""Tokens of all rows; no state of so few is looked at."""
_MOST_CAPACITY: Final = 2**31 - 1


def generate(
    graphdef: nnx.GraphDef,
    params: Params,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    *,
    max_tokens: int,
    mesh: Mesh | None = None,
) -> list[list[int]]:
    """Continue each prompt by up to `max_tokens` tokens; a continuation ends before the first of the sampler's `ends`.

    Args:
        prompts: token ids, at least one per prompt; lengths may differ.
        mesh: where the parameters lie, if that is several devices; prompts are split over its batch axes.

    Compiles once per (batch size, padded prompt length, max_tokens): prompts are padded to a power of two. The
    state's capacity is sized here, so that no length is too long for it.

    Raises:
        UserError: no prompt, an empty prompt, or a negative `max_tokens`.
    """
    check_max_tokens(max_tokens)
    tokens, reset = pad_prompts(prompts)
    if max_tokens == 0:
        return [[] for _ in prompts]
    check_capacity(graphdef, params, len(tokens), tokens.shape[1] + max_tokens, mesh)
    tokens, reset = split_rows((tokens, reset), mesh)
    logits, state = prefill(graphdef, params, tokens, reset, capacity=tokens.shape[1] + max_tokens, mesh=mesh)
    new_tokens, lengths, _, _ = decode(graphdef, params, sampler, logits, state, max_tokens=max_tokens, mesh=mesh)
    return [row[:length].tolist() for row, length, _ in zip(np.asarray(new_tokens), np.asarray(lengths), prompts)]


def split_rows(arrays: Any, mesh: Mesh | None) -> Any:
    """Arrays [B, ...] with their rows split over the devices of a mesh; the last is repeated until they divide. None: as they are."""
    if mesh is None:
        return arrays
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    place = NamedSharding(mesh, PartitionSpec(BATCH_AXES))

    def split(array: np.ndarray) -> jax.Array:
        missing = -len(array) % parts
        return jax.device_put(np.concatenate([array, *[array[-1:]] * missing]), place)

    return jax.tree.map(split, arrays)


def _traced_for(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if mesh is None else ops.on_mesh(mesh)


def stream(
    graphdef: nnx.GraphDef,
    params: Params,
    sampler: Sampler,
    logits: Float[Array, "1 L"],
    state: model.UnstackedState,
    *,
    max_tokens: int,
    first_index: int,
) -> Iterator[int]:
    """The tokens that `decode` would sample for one row, each as soon as it is known; a token that ends the text is the last.

    Every token costs a call from the host.

    Args:
        logits, state: from `prefill` or an earlier call; the state is used up.
        first_index: as in `decode`.
    """
    ends = set(sampler.ends)
    sampler = jax.device_put(sampler)  # once, not once a token
    advance = stepper(graphdef)
    token, index = _sample_at(sampler, logits, jnp.int32(first_index))
    for left in reversed(range(max_tokens)):
        # The next call is dispatched before this token is read, so that host and device overlap.
        if left:
            following, index, state = advance(params, sampler, token, index, state)
        token_id = int(np.asarray(token)[0])
        yield token_id
        if token_id in ends:
            return
        if left:
            token = following


def check_max_tokens(max_tokens: int) -> None:
    """Raises UserError where it is negative, or no whole number."""
    why = ranges.problem(ranges.CountOrZero, max_tokens, str)
    if why is not None:
        raise UserError(f"max_tokens={ranges.short_repr(max_tokens)} {why}")


def check_capacity(graphdef: nnx.GraphDef, params: Params, rows: int, capacity: int, mesh: Mesh | None = None) -> None:
    """Raises UserError where a state of so many rows and tokens is more than a device has, before any of it is asked for."""
    if rows * capacity <= _SMALL_CAPACITY:
        return
    wanted = f"{rows:,} texts of {capacity:,} tokens, prompts included"
    if capacity > _MOST_CAPACITY:
        raise UserError(f"{wanted}, are more than a state can have; lower max_tokens")
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flatten())
    state = jax.eval_shape(lambda params: model.merge(graphdef, params).init_state(rows, capacity), params)
    parts = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    needed = (sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) + 4 * rows * capacity) // parts
    instead = "lower max_tokens, or continue fewer texts at a time"
    device_memory.check(needed, devices, f"{wanted}, need a state of", instead)


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


@functools.lru_cache(maxsize=8)
def stepper(graphdef: nnx.GraphDef) -> Callable:
    """A compiled call for every token of a stream: what the host does between two of them is this call alone.

    Made once for a model, whose structure then is not looked at again: (params, sampler, token [B], index, state) -> (the token
    after it, sampled as the one at ``index``; index + 1; the state). The state passed is used up.
    """

    def advance(params, sampler, token, index, state):
        logits, state = _next_logits(graphdef, params, token, state)
        return *_sample_at(sampler, logits, index), state

    return jax.jit(advance, donate_argnums=4)


@jax.jit
def _sample_at(sampler, logits, index):
    """The token at a place of the key's sequence, and the next place."""
    return sampler(logits, index), index + 1


@functools.partial(jax.jit, static_argnums=0, static_argnames=("capacity", "mesh"))
def prefill(graphdef, params, tokens, reset, *, capacity, mesh=None):
    """Read padded prompts in one call: logits after the last token [B, L], and the state that `decode` goes on from.

    Args:
        tokens, reset: [B, T], as `pad_prompts` makes them.
        capacity: tokens the state can hold, prompt included.
        mesh: as in `generate`.
    """
    with _traced_for(mesh):
        network = model.merge(graphdef, params)
        hidden, state = network.features(tokens, network.init_state(tokens.shape[0], capacity), reset=reset)
        logits = network.logits(hidden[:, -1])  # of T positions, one is wanted
        return logits, network.unstack_state(state)


def _next_logits(graphdef, params, token, state):
    logits, state = model.merge(graphdef, params)(token[:, None], state)
    return logits[:, 0], state


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_tokens", "mesh"))
def decode(graphdef, params, sampler, logits, state, *, max_tokens, first_index=0, mesh=None):
    """Sample until every row has ended or `max_tokens`: (tokens [B, max_tokens], lengths [B], logits, state).

    The logits and the state are those after the last token that any row sampled (the one that ended it included; a row that has
    ended reads on with the others, so that only a batch of one can be continued from them).

    Args:
        logits, state: from `prefill` or an earlier call; the state has room for `max_tokens` more.
        first_index: place of the first token in the key's sequence: how many were sampled by earlier calls.
        mesh: as in `generate`.
    """
    batch_size = logits.shape[0]

    def unfinished(carry):
        index, _, _, _, lengths = carry
        return (index < max_tokens) & jnp.any(lengths == index)

    def one_token(carry):
        index, logits, state, tokens, lengths = carry
        token = sampler(logits, first_index + index)
        # A row is alive while its length is the number of steps so far.
        lengths = lengths + ((lengths == index) & ~sampler.is_end(token))
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, index, axis=1)
        logits, state = _next_logits(graphdef, params, token, state)
        return index + 1, logits, state, tokens, lengths

    tokens = jnp.zeros((batch_size, max_tokens), jnp.int32)
    lengths = jnp.zeros(batch_size, jnp.int32)
    carry = (jnp.int32(0), logits, state, tokens, lengths)
    with _traced_for(mesh):
        _, logits, state, tokens, lengths = jax.lax.while_loop(unfinished, one_token, carry)
    return tokens, lengths, logits, state
