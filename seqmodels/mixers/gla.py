"""Gated linear attention: every key channel of the memory fades at a rate read from the token.

    q_t, k_t, v_t = x_t W_q, x_t W_k, x_t W_v                                        split into heads
    alpha_t = sigmoid(x_t W_1 W_2 + b)^(1/tau)                                       one per key channel
    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T
    o_t = RMSNorm(K^-1/2 q_t^T S_t)                                                  in every head
    y_t = (silu(x_t W_g) * concat(o_t)) W_o

"Gated linear attention transformers with hardware-efficient training", arXiv 2312.06635, Table 1 and section
4.4.

Table 1 of arXiv 2312.06635: G_t = α_tᵀ 1, α_t = σ(x_t W_α1 W_α2)^(1/τ)

State: K V numbers per head in float32.

Numerical trap: alpha_t is never formed: its logarithm is log_sigmoid(.)/tau, in float32. The op multiplies
only by decays, never divides by one, so that no gate is clamped.

Parameters: 4 D^2 + 1.5 D decay_rank + D/2, the paper's own sizes.

Deviations from the paper: RMSNorm with a scale shared by the heads instead of LayerNorm, and no bias on the
output gate, both as in flash-linear-attention. q is scaled, where the authors' code scales k; the norm undoes
either, up to its epsilon.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from seqmodels.layers import NoWeightDecay, RMSNorm, Weight, dense, head_widths, normal_init, xavier_uniform_init
from seqmodels.ops.dispatch import Implementation
from seqmodels.ops.gated_linear_attention import gated_linear_attention
from seqmodels.ranges import Checked, Epsilon, Expansion, Positive, Size

GAIN = 2**-2.5  # of the Xavier initialisation of queries, keys and decays in the authors' code


@dataclasses.dataclass(frozen=True)
class Config(Checked, where="model.mixers.gla"):
    num_heads: Size = 4  # H; divides the widths of keys and values
    key_expansion: Expansion = 0.5  # H K = key_expansion d_model
    value_expansion: Expansion = 1.0  # H V = value_expansion d_model
    decay_rank: Size = 16  # width between W_1 and W_2
    temperature: Positive = 16.0  # tau: gates are sigmoid^(1/tau), the larger the slower to forget
    norm_eps: Epsilon = 1e-5  # of the heads' RMSNorm
    implementation: Implementation | None = None  # of gated_linear_attention; None: the fastest for device and shape
    chunk_size: Size | None = None  # steps per chunk of the chunked form; None: the fastest for the device

    @classmethod
    def paper(cls) -> "Config":
        """The published sizes (4 heads at every width, arXiv 2312.06635, section 5), which are the defaults."""
        return cls()


State = Float[Array, "B H K V"]
"""S."""


class Mixer(nnx.Module):
    """Gated linear attention behind the interface of a mixer."""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        key_dim, value_dim = int(config.key_expansion * d_model), int(config.value_expansion * d_model)
        self.config = config
        self.key_head_dim, self.value_head_dim = head_widths(config, d_model, keys=key_dim, values=value_dim)
        rank = config.decay_rank
        self.query_kernel = Weight(xavier_uniform_init(rngs.params(), (d_model, key_dim), gain=GAIN))
        self.key_kernel = Weight(xavier_uniform_init(rngs.params(), (d_model, key_dim), gain=GAIN))
        self.value_kernel = Weight(normal_init(rngs.params(), (d_model, value_dim)))
        self.gate_kernel = Weight(normal_init(rngs.params(), (d_model, value_dim)))
        self.decay_in_kernel = NoWeightDecay(xavier_uniform_init(rngs.params(), (d_model, rank), gain=GAIN))
        self.decay_out_kernel = NoWeightDecay(xavier_uniform_init(rngs.params(), (rank, key_dim), gain=GAIN))
        self.decay_bias = nnx.Param(jax.random.uniform(rngs.params(), (key_dim,), jnp.float32, -(rank**-0.5), rank**-0.5))
        self.head_norm = RMSNorm(self.value_head_dim, eps=config.norm_eps, rngs=rngs)
        self.output_kernel = Weight(normal_init(rngs.params(), (value_dim, d_model)))

    def init_state(self, batch_size: int, max_len: int) -> State:
        """Zeros; the size does not depend on ``max_len``."""
        shape = (batch_size, self.config.num_heads, self.key_head_dim, self.value_head_dim)
        return jnp.zeros(shape, jnp.float32)

    def log_decay(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H K"]:
        """log(alpha_t) of every key channel, float32."""
        logit = dense(dense(x, self.decay_in_kernel[...]), self.decay_out_kernel[...]).astype(jnp.float32)
        log_decay = jax.nn.log_sigmoid(logit + self.decay_bias[...]) / self.config.temperature
        return log_decay.reshape(*x.shape[:2], self.config.num_heads, self.key_head_dim)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, *, reset: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        """Mixes T steps that follow those of ``state``; ``reset`` marks the steps at which a new document starts."""
        B, T, _ = x.shape
        H, K, V = self.config.num_heads, self.key_head_dim, self.value_head_dim
        q = dense(x, self.query_kernel[...]).reshape(B, T, H, K)
        k = dense(x, self.key_kernel[...]).reshape(B, T, H, K)
        v = dense(x, self.value_kernel[...]).reshape(B, T, H, V)
        o, state = gated_linear_attention(
            q * K**-0.5,
            k,
            v,
            self.log_decay(x),
            state=state,
            reset=reset,
            implementation=self.config.implementation,
            chunk_size=self.config.chunk_size,
        )
        y = jax.nn.silu(dense(x, self.gate_kernel[...])) * self.head_norm(o).reshape(B, T, H * V)
        return dense(y, self.output_kernel[...]), state
