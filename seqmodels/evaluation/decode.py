"""What decoding costs: seconds a token at a given batch and context, as `generate` decodes."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqmodels import generate

Params = Any  # the pure dict of arrays that setup.init() and a checkpoint hold


@dataclasses.dataclass(frozen=True)
class DecodeSpeed:
    """Greedy decoding of `batch_size` rows at once."""

    batch_size: int
    context: int  # tokens read before the first one is written
    tokens: int  # written by each row
    seconds_per_step: float  # one token for every row, the fastest of the rounds
    compile_seconds: float  # first call less the fastest

    @property
    def tokens_per_second(self) -> float:
        """Over all rows."""
        return self.batch_size / self.seconds_per_step


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
    """Time the loop that `generate.generate` runs after the prompt, prompts being random tokens.

    Args:
        rounds: the loop runs so often after the run that compiles; other work on the machine only ever adds time.
        key: of the random tokens.
    """
    prompts = np.asarray(jax.random.randint(key, (batch_size, context), 0, vocab_size))
    padded, reset = generate.pad_prompts([row.tolist() for row in prompts])
    logits, state = generate.prefill(graphdef, params, padded, reset, capacity=padded.shape[1] + tokens)

    def run() -> float:
        start = time.perf_counter()
        out = generate.decode(
            graphdef, params, logits, state, key, jnp.int32(-1), max_tokens=tokens,
            greedy=True, temperature=1.0, top_k=None, top_p=None,
        )  # fmt: skip
        jax.block_until_ready(out)
        return time.perf_counter() - start

    first, fastest = run(), min(run() for _ in range(rounds))
    return DecodeSpeed(batch_size, context, tokens, fastest / tokens, max(0.0, first - fastest))
