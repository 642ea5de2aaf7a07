"""What decoding costs: seconds a token at a given batch and context, as `generate` decodes."""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from seqmodels import model
from seqmodels.decoding import generate
from seqmodels.decoding.sampling import Sampler, Sampling

Params = Any  # the pure dict of arrays that trainer.init() and a checkpoint hold
PREFILL_CHUNK = 1024  # tokens of the context read in one call


@dataclasses.dataclass(frozen=True)
class DecodeSpeed:
    """Greedy decoding of `batch_size` rows at once."""

    batch_size: int
    context: int  # tokens read before the first one is written
    tokens: int  # written by each row
    seconds_per_step: float  # one token for every row, the fastest of the rounds
    compile_seconds: float  # first call less the fastest
    prefill_tokens_per_second: float  # of one row, the last piece of the context
    state_bytes: int  # of the state there was, all rows

    @property
    def tokens_per_second(self) -> float:
        """Over all rows."""
        return self.batch_size / self.seconds_per_step


@dataclasses.dataclass(frozen=True)
class Context:
    """What one row has read, with room for more."""

    length: int  # tokens
    logits: jax.Array  # [1, L]
    state: Any
    tokens_per_second: float  # of the last piece


def measure(
    graphdef: nnx.GraphDef,
    params: Params,
    vocab_size: int,
    *,
    batch_size: int = 1,
    context: int = 256,
    tokens: int = 128,
    rounds: int = 3,
    key: jax.Array,
) -> DecodeSpeed:
    """Time the loop that `generate.generate` runs after the prompt.

    Args:
        context: so many random tokens are read before, by one row; its state is then every row's.
        rounds: the loop runs so often after the run that compiles; other work on the machine only ever adds time.
        key: of the random tokens.
    """
    before = read(graphdef, params, vocab_size, context=context, extra_capacity=tokens, key=key)
    return measure_after(graphdef, params, before, batch_size=batch_size, tokens=tokens, rounds=rounds)


def read(
    graphdef: nnx.GraphDef, params: Params, vocab_size: int, *, context: int, extra_capacity: int, key: jax.Array
) -> Context:
    """Read `context` random tokens in pieces.

    Raises:
        UserError: a state of so many is more than the device has.
    """
    generate.check_capacity(graphdef, params, 1, context + extra_capacity)
    prompt = jax.random.randint(key, (1, context), 0, vocab_size, jnp.int32)
    pieces = [prompt[:, begin : begin + PREFILL_CHUNK] for begin in range(0, context, PREFILL_CHUNK)]
    capacity = context + extra_capacity
    jax.block_until_ready(_read(graphdef, params, pieces[-1], _empty(graphdef, params, capacity)))  # compiles
    state = _empty(graphdef, params, capacity)
    for piece in pieces:
        begun = time.perf_counter()
        logits, state = jax.block_until_ready(_read(graphdef, params, piece, state))
        seconds = time.perf_counter() - begun
    return Context(context, logits, state, pieces[-1].shape[1] / seconds)


def measure_after(
    graphdef: nnx.GraphDef, params: Params, context: Context, *, batch_size: int, tokens: int, rounds: int
) -> DecodeSpeed:
    """The same after a context that has been read, with room for `tokens`; it stays as it is."""
    logits, state = _repeat(graphdef, params, context.logits, context.state, batch_size)
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    sampler = Sampler(Sampling(temperature=0.0), jax.random.key(0))

    def run() -> float:
        begun = time.perf_counter()
        out = generate.decode(graphdef, params, sampler, logits, state, max_tokens=tokens)
        jax.block_until_ready(out)
        return time.perf_counter() - begun

    first, fastest = run(), min(run() for _ in range(rounds))
    return DecodeSpeed(
        batch_size, context.length, tokens, fastest / tokens, max(0.0, first - fastest), context.tokens_per_second,
        state_bytes,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 2))
def _empty(graphdef, params, capacity):
    return model.merge(graphdef, params).init_state(1, capacity)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _read(graphdef, params, tokens, state):
    network = model.merge(graphdef, params)
    hidden, state = network.features(tokens, state)
    return network.logits(hidden[:, -1]), state


@functools.partial(jax.jit, static_argnums=(0, 4))
def _repeat(graphdef, params, logits, state, batch_size):
    """The same row so many times, and the state as one-token steps like it."""
    state = jax.tree.map(lambda leaf: jnp.repeat(leaf, batch_size, axis=1), state)
    return jnp.repeat(logits, batch_size, axis=0), model.merge(graphdef, params).unstack_state(state)
