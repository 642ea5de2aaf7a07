"""Gated retention (gRet), YOCO's self-decoder: retention whose decay is read from the token, one number per
head.

    q_t, k_t, v_t = rotate(x_t W_q, t), rotate(x_t W_k, t), x_t W_v                  split into heads
    gamma_t = sigmoid(x_t W_gamma)^(1/tau)                                           one per head
    S_t = gamma_t S_{t-1} + k_t v_t^T
    o_t = RMSNorm(K^-1/2 q_t^T S_t)                                                  in every head
    y_t = (silu(x_t W_g) * concat(o_t)) W_o

"You only cache once", arXiv 2405.05254, section 3.1; "Gated Retention" in Table 1 of arXiv 2312.06635. Rotary
pairs are (2i, 2i + 1), as in its authors' code.

Table 1 of arXiv 2312.06635: G_t = γ_t 1ᵀ1, γ_t = σ(x_t W_γ)^(1/τ)

State: K V numbers per head in float32, and the position.

Numerical trap: gamma_t is never formed: its logarithm is log_sigmoid(.)/tau, in float32, which underflows for
no gate. As in RetNet, the position is part of the state.

Parameters: 4 D^2 + D H with the default key_expansion; 5 D^2 + D H with the paper's.

Deviations from the paper: keys and queries have half the width of values unless ``key_expansion=1``.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from seqmodels.errors import UserError
from seqmodels.layers import NoWeightDecay, Weight, dense, rms_norm, xavier_uniform_init
from seqmodels.ops.dispatch import Implementation
from seqmodels.ops.gated_linear_attention import gated_linear_attention
from seqmodels.ops.rotary import document_positions, rotary
from seqmodels.ranges import Checked, Epsilon, Expansion, Positive, Size

INPUT_GAIN, OUTPUT_GAIN = 2**-2.5, 2**-1.0  # of the Xavier initialisation in YOCO's code


@dataclasses.dataclass(frozen=True)
class Config(Checked, where="model.mixers.gated_retention"):
    num_heads: Size = 4  # H; divides d_model and the width of the keys
    key_expansion: Expansion = 0.5  # H K = key_expansion d_model; the paper has 1
    temperature: Positive = 16.0  # tau: gates are sigmoid^(1/tau), the larger the slower to forget
    rope_base: Positive = 10000.0  # rotary wavelengths go from 2 pi to about 2 pi rope_base steps
    norm_eps: Epsilon = 1e-5  # of the heads' RMSNorm
    implementation: Implementation | None = None  # of gated_linear_attention; None: the fastest for device and shape
    chunk_size: Size | None = None  # steps per chunk of the chunked form; None: the fastest for the device

    @classmethod
    def paper(cls, d_model: int) -> "Config":
        """The sizes of YOCO's code: heads of width 256, keys as wide as values; d_model is a multiple of 256."""
        return cls(num_heads=d_model // 256, key_expansion=1.0)


class State(NamedTuple):
    memory: Float[Array, "B H K V"]  # S
    position: Int[Array, " B"]  # of the next token within its document


class Mixer(nnx.Module):
    """Gated retention behind the interface of a mixer."""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        key_dim = int(config.key_expansion * d_model)
        self.config = config
        self.key_head_dim, odd_keys = divmod(key_dim, config.num_heads)
        self.value_head_dim, odd_values = divmod(d_model, config.num_heads)
        if odd_keys or odd_values or not key_dim or self.key_head_dim % 2:
            raise UserError(
                f"model.mixers.gated_retention.num_heads={config.num_heads} must divide model.d_model={d_model}, "
                f"and divide the width of the keys ({key_dim}, key_expansion times d_model) into even numbers"
            )
        self.query_kernel = Weight(xavier_uniform_init(rngs.params(), (d_model, key_dim), gain=INPUT_GAIN))
        self.key_kernel = Weight(xavier_uniform_init(rngs.params(), (d_model, key_dim), gain=INPUT_GAIN))
        self.value_kernel = Weight(xavier_uniform_init(rngs.params(), (d_model, d_model), gain=INPUT_GAIN))
        self.gate_kernel = Weight(xavier_uniform_init(rngs.params(), (d_model, d_model), gain=INPUT_GAIN))
        self.decay_kernel = NoWeightDecay(xavier_uniform_init(rngs.params(), (d_model, config.num_heads), gain=INPUT_GAIN))
        self.output_kernel = Weight(xavier_uniform_init(rngs.params(), (d_model, d_model), gain=OUTPUT_GAIN))

    def init_state(self, batch_size: int, max_len: int) -> State:
        """Zeros, at position 0; the size does not depend on ``max_len``."""
        shape = (batch_size, self.config.num_heads, self.key_head_dim, self.value_head_dim)
        return State(jnp.zeros(shape, jnp.float32), jnp.zeros((batch_size,), jnp.int32))

    def log_decay(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H 1"]:
        """log(gamma_t) of every head, float32."""
        logit = dense(x, self.decay_kernel[...]).astype(jnp.float32)
        return (jax.nn.log_sigmoid(logit) / self.config.temperature)[..., None]

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, *, reset: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        """Mixes T steps that follow those of ``state``; ``reset`` marks the steps at which a new document starts."""
        B, T, _ = x.shape
        H, K, V = self.config.num_heads, self.key_head_dim, self.value_head_dim
        q = dense(x, self.query_kernel[...]).reshape(B, T, H, K)
        k = dense(x, self.key_kernel[...]).reshape(B, T, H, K)
        v = dense(x, self.value_kernel[...]).reshape(B, T, H, V)
        memory, start = (None, None) if state is None else state
        positions = document_positions(T, start=start, reset=reset)
        q, k = (rotary(side, positions, base=self.config.rope_base, interleaved=True) for side in (q, k))
        o, memory = gated_linear_attention(
            q * K**-0.5,
            k,
            v,
            self.log_decay(x),
            state=memory,
            reset=reset,
            implementation=self.config.implementation,
            chunk_size=self.config.chunk_size,
        )
        o = rms_norm(o, eps=self.config.norm_eps)
        y = jax.nn.silu(dense(x, self.gate_kernel[...])) * o.reshape(B, T, H * V)
        position = jnp.broadcast_to(positions[:, -1] + 1, (B,))
        return dense(y, self.output_kernel[...]), State(memory, position)
