"""Multi-scale retention, RetNet's mixer: linear attention whose memory fades, in each head at a fixed rate of
its own.

    q_t, k_t, v_t = rotate(x_t W_q, t), rotate(x_t W_k, t), x_t W_v                  split into heads
    S_t = gamma_h S_{t-1} + k_t v_t^T        gamma_h = 1 - 2^(-5-h), h = 0 .. H-1
    o_t = RMSNorm(K^-1/2 q_t^T S_t)                                                  in every head
    y_t = (silu(x_t W_g) * concat(o_t)) W_o

"Retentive network", arXiv 2307.08621, eq. 5-6 (retention, the rotation written as a complex exponential) and
8 (heads, norm, gate); the norm, the angles and the initialisation are those of its authors' torchscale.

State: K V numbers per head in float32, and the position.

Numerical trap: rotated keys are summed, so queries and keys of one document must count positions from the
same start: the position is part of the state.

Parameters: 4 D^2 with the default expansions (V = 2 K as published, both halved); 8 D^2 with the paper's.

Deviations from the paper: RMSNorm instead of GroupNorm, as torchscale has it. torchscale also divides scores,
or the state, by running sums before the norm, which the norm undoes up to its epsilon; not here.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from seqmodels.errors import UserError
from seqmodels.layers import RMSNorm, Weight, dense, head_widths, rms_norm, xavier_uniform_init
from seqmodels.ops.dispatch import Implementation
from seqmodels.ops.gated_linear_attention import gated_linear_attention
from seqmodels.ops.rotary import document_positions, rotary
from seqmodels.ranges import Checked, Epsilon, Expansion, OneOf, Positive, Size

ROPES = ("retnet", "llama", "none")
INPUT_GAIN, OUTPUT_GAIN = 2**-2.5, 2**-1.0  # of the Xavier initialisation in torchscale


@dataclasses.dataclass(frozen=True)
class Config(Checked, where="model.mixers.retnet"):
    num_heads: Size = 4  # H, each with a decay of its own
    key_expansion: Expansion = 0.5  # H K = key_expansion d_model; the paper has 1
    value_expansion: Expansion = 1.0  # H V = value_expansion d_model; the paper has 2
    # retnet: pairs (2i, 2i + 1), frequencies base^-linspace(0, 1, K/2); llama: pairs (i, i + K/2), base^(-2i/K); none
    rope: Annotated[str, OneOf(ROPES)] = "retnet"
    rope_base: Positive = 10000.0  # rotary wavelengths go from 2 pi to about 2 pi rope_base steps
    norm_scale: bool = False  # a learned scale on the heads' norm, shared by the heads
    norm_eps: Epsilon = 1e-6  # of the heads' norm
    implementation: Implementation | None = None  # of gated_linear_attention; None: the fastest for device and shape
    chunk_size: Size | None = None  # steps per chunk of the chunked form; None: the fastest for the device

    @classmethod
    def paper(cls, d_model: int) -> "Config":
        """The published sizes: K = 256, V = 512 (arXiv 2307.08621, section 3.1); d_model is a multiple of 256."""
        return cls(num_heads=d_model // 256, key_expansion=1.0, value_expansion=2.0)


class State(NamedTuple):
    memory: Float[Array, "B H K V"]  # S
    position: Int[Array, " B"]  # of the next token within its document


class Mixer(nnx.Module):
    """Retention behind the interface of a mixer."""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        key_dim, value_dim = int(config.key_expansion * d_model), int(config.value_expansion * d_model)
        self.config = config
        self.key_head_dim, self.value_head_dim = head_widths(config, d_model, keys=key_dim, values=value_dim)
        if config.rope != "none" and self.key_head_dim % 2:
            raise UserError(
                f"model.mixers.retnet.rope={config.rope!r} turns pairs of features, but a key has {self.key_head_dim}: "
                "change num_heads or key_expansion, or set rope=none"
            )
        self.query_kernel = Weight(xavier_uniform_init(rngs.params(), (d_model, key_dim), gain=INPUT_GAIN))
        self.key_kernel = Weight(xavier_uniform_init(rngs.params(), (d_model, key_dim), gain=INPUT_GAIN))
        self.value_kernel = Weight(xavier_uniform_init(rngs.params(), (d_model, value_dim), gain=INPUT_GAIN))
        self.gate_kernel = Weight(xavier_uniform_init(rngs.params(), (d_model, value_dim), gain=INPUT_GAIN))
        self.output_kernel = Weight(xavier_uniform_init(rngs.params(), (value_dim, d_model), gain=OUTPUT_GAIN))
        if config.norm_scale:
            self.head_norm = RMSNorm(self.value_head_dim, eps=config.norm_eps, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int) -> State:
        """Zeros, at position 0; the size does not depend on ``max_len``."""
        shape = (batch_size, self.config.num_heads, self.key_head_dim, self.value_head_dim)
        return State(jnp.zeros(shape, jnp.float32), jnp.zeros((batch_size,), jnp.int32))

    def log_decay(self) -> Float[np.ndarray, " H"]:
        """log(gamma_h) of every head; nothing learns it."""
        return np.log1p(-(2.0 ** (-5.0 - np.arange(self.config.num_heads)))).astype(np.float32)

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
        q, k = self._rotate(q, positions), self._rotate(k, positions)
        o, memory = gated_linear_attention(
            q * K**-0.5,
            k,
            v,
            jnp.broadcast_to(self.log_decay()[:, None], (B, T, H, 1)),
            state=memory,
            reset=reset,
            implementation=self.config.implementation,
            chunk_size=self.config.chunk_size,
        )
        o = self.head_norm(o) if self.config.norm_scale else rms_norm(o, eps=self.config.norm_eps)
        y = jax.nn.silu(dense(x, self.gate_kernel[...])) * o.reshape(B, T, H * V)
        position = jnp.broadcast_to(positions[:, -1] + 1, (B,))
        return dense(y, self.output_kernel[...]), State(memory, position)

    def _rotate(self, x, positions):
        if self.config.rope == "none":
            return x
        if self.config.rope == "llama":
            return rotary(x, positions, base=self.config.rope_base)
        exponents = np.linspace(0.0, 1.0, self.key_head_dim // 2)
        frequencies = jnp.asarray(self.config.rope_base**-exponents, jnp.float32)
        return rotary(x, positions, interleaved=True, frequencies=frequencies)
