"""Multi-head softmax attention, the classic mixer and the yardstick of the others.

    q_t, k_t, v_t = x_t W_q, x_t W_k, x_t W_v                                   split into heads of width K
    o_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt(K)) v_s                       in every head
    y_t = concat(o_t) W_o

"Attention is all you need", arXiv 1706.03762, eq. 1 and section 3.2.2. Options: rotary positions on q and k (RoFormer,
arXiv 2104.09864, eq. 34, in Llama's half-split pairs), key/value heads shared by groups of query heads
(arXiv 2305.13245), a sliding window (arXiv 2004.05150, section 3.1), RMSNorm on q and k per head (after arXiv 2010.04245).

State: 2 G K numbers per live token in the compute dtype (at most ``window`` tokens), and the position. It is the only
state on the list that grows with the text.

Numerical trap: scores and softmax are float32 whatever the activations are; a masked weight of zero times another
document's NaN is NaN, which the op guards against.

Deviations from the paper: no bias, no dropout on the weights, rotary positions instead of added sinusoids.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from seqmodels.errors import UserError
from seqmodels.layers import RMSNorm, Weight, dense, matmul_precision, normal_init
from seqmodels.ops.dispatch import Implementation
from seqmodels.ops.rotary import document_positions, rotary
from seqmodels.ops.softmax_attention import Cache, init_cache, softmax_attention
from seqmodels.ranges import Checked, Count, Divides, Positive, Size


@dataclasses.dataclass(frozen=True)
class Config(Checked, where="model.mixers.attention"):
    num_heads: Size = 4  # H, query heads; divides d_model unless head_dim is given
    # G, key/value heads, a divisor of num_heads; None: as many as query heads
    num_kv_heads: Annotated[Size | None, Divides("num_heads")] = None
    head_dim: Size | None = None  # K, width of a head; None: d_model / num_heads
    rope: bool = True  # rotary positions; without them order is known through the causal mask alone
    rope_base: Positive = 10000.0  # rotary wavelengths go from 2 pi to about 2 pi rope_base steps
    window: Count | None = None  # steps a query sees, its own included; None: all of them
    qk_norm: bool = False  # RMSNorm on queries and keys, per head, before the rotation
    implementation: Implementation | None = None  # of softmax_attention; None: the fastest for device and shape


class State(NamedTuple):
    cache: Cache
    position: Int[Array, " B"]  # of the next token within its document


class Mixer(nnx.Module):
    """Attention behind the interface of a mixer.

    Args:
      compute_dtype: of the cached keys and values.
    """

    def __init__(self, config: Config, d_model: int, *, compute_dtype=jnp.float32, rngs: nnx.Rngs):
        if config.head_dim is None and d_model % config.num_heads:
            raise UserError(f"model.mixers.attention.num_heads={config.num_heads} must divide model.d_model={d_model}")
        self.config = config
        self.compute_dtype = compute_dtype
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        self.head_dim = config.head_dim or d_model // config.num_heads
        if config.rope and self.head_dim % 2:
            raise UserError(
                f"model.mixers.attention.head_dim={self.head_dim} must be even for rope; change num_heads or head_dim"
            )
        query_dim, kv_dim = config.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.query_kernel = Weight(normal_init(rngs.params(), (d_model, query_dim)))
        self.key_kernel = Weight(normal_init(rngs.params(), (d_model, kv_dim)))
        self.value_kernel = Weight(normal_init(rngs.params(), (d_model, kv_dim)))
        self.output_kernel = Weight(normal_init(rngs.params(), (query_dim, d_model)))
        if config.qk_norm:
            self.query_norm = RMSNorm(self.head_dim, rngs=rngs)
            self.key_norm = RMSNorm(self.head_dim, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int) -> State:
        """An empty cache for ``max_len`` live tokens (``window``, where that is fewer), at position 0."""
        cache = init_cache(
            batch_size,
            max_len,
            self.num_kv_heads,
            self.head_dim,
            self.head_dim,
            window=self.config.window,
            dtype=self.compute_dtype,
        )
        return State(cache, jnp.zeros((batch_size,), jnp.int32))

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, *, reset: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        """Mixes T steps that follow those of ``state``; ``reset`` marks the steps at which a new document starts."""
        (B, T, _), K = x.shape, self.head_dim
        v = dense(x, self.value_kernel[...]).reshape(B, T, self.num_kv_heads, K)
        cache, start = (None, None) if state is None else state
        positions = document_positions(T, start=start, reset=reset)
        q, k = self._queries_and_keys(x, positions)
        o, cache = softmax_attention(
            q * K**-0.5,
            k,
            v,
            cache=cache,
            reset=reset,
            window=self.config.window,
            implementation=self.config.implementation,
        )
        y = dense(o.reshape(B, T, self.config.num_heads * K), self.output_kernel[...])
        return y, State(cache, jnp.broadcast_to(positions[:, -1] + 1, (B,)))

    def weights(self, x: Float[Array, "B T D"]) -> Float[Array, "B H T T"]:
        """The softmax of each head, float32, from an empty state: rows are queries, and sum to 1. To look at: it holds all pairs."""
        T = x.shape[1]
        q, k = self._queries_and_keys(x, document_positions(T))
        k = jnp.repeat(k, self.config.num_heads // self.num_kv_heads, axis=2)
        q, k = (side.astype(jnp.float32) for side in (q * self.head_dim**-0.5, k))
        scores = jnp.einsum("bthk,bshk->bhts", q, k, precision=matmul_precision(q.dtype))
        ago = jnp.arange(T)[:, None] - jnp.arange(T)
        seen = (ago >= 0) & (ago < (self.config.window or T))
        return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)

    def _queries_and_keys(self, x, positions):
        (B, T, _), K = x.shape, self.head_dim
        q = dense(x, self.query_kernel[...]).reshape(B, T, self.config.num_heads, K)
        k = dense(x, self.key_kernel[...]).reshape(B, T, self.num_kv_heads, K)
        if self.config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.config.rope:
            q, k = (rotary(side, positions, base=self.config.rope_base) for side in (q, k))
        return q, k
