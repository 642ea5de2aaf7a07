"""Mamba-2 (SSD): a state space model with one decay per head, which is linear attention with a forgetting rate.

    [x_t, B_t, C_t] = silu(conv(u W_x)_t),   z_t = u_t W_z                  causal, depthwise, W steps
    dt_t = softplus(u_t W_dt + b_dt)                                        one per head
    S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T,   A = -exp(A_log)         in every head, [N, P]
    o_t = S_t^T C_t + D x_t
    y_t = RMSNorm(silu(z_t) * concat(o_t)) W_o                              over groups of E / G features

u_t are the layer's inputs, P is the width of a head; the H / G heads of a group share B and C.

"Transformers are SSMs", arXiv 2405.21060, section 7 and figure 6; the initialisation is that of its authors' code.

Table 1 of arXiv 2312.06635: G_t = γ_t 1ᵀ1, γ_t = exp(-softplus(x_t W_γ) exp(a))

State: N P numbers per head, and the last W - 1 inputs of the convolution, E + 2 G N each; all float32.

Numerical trap: dt A may be any negative number, so that nothing may divide by a decay; softplus, A_log, D and the
state are float32 whatever the activations are. A limit on dt belongs to the step by step form too (the one of
Hugging Face forgets it).

Parameters: E (3 D + W + 2) + 2 G N (D + W + 1) + H (D + 3): 6 D^2 with E = 2 D, and at D = 128 another D^2 for B and C.
The block stands alone in the paper: two of them replace attention and an MLP.

Deviations from the paper: the small sizes of the defaults. The authors' in_proj is three kernels here.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from seqmodels.errors import UserError
from seqmodels.layers import NoWeightDecay, Weight, dense, fan_in_uniform_init, gated_rms_norm, step_size_bias_init
from seqmodels.ops.causal_conv import causal_conv
from seqmodels.ops.dispatch import Implementation
from seqmodels.ops.gated_linear_attention import gated_linear_attention
from seqmodels.ranges import Above, AtMost, Checked, Epsilon, NonNegative, Size, Taps

PATTERN = "mamba2 mamba2"
"""The layers that replace "attention mlp"."""


@dataclasses.dataclass(frozen=True)
class Config(Checked, where="model.mixers.mamba2"):
    expand: Annotated[Size, AtMost(1024)] = 2  # E = expand d_model, the inner width
    head_dim: Size = 32  # P = E / H, width of a head; the paper has 64
    d_state: Size = 64  # N, state per channel; the paper has 128
    num_groups: Size = 1  # G, sets of B and C, each for H / G heads; also the groups of the norm
    conv_width: Taps = 4  # W, steps the convolution sees
    dt_smallest: NonNegative = 0.0  # step sizes below it are raised to it
    dt_largest: Annotated[float | None, Above("dt_smallest")] = None  # step sizes above it are lowered to it; None: no limit
    norm_eps: Epsilon = 1e-5  # of the gated norm
    implementation: Implementation | None = None  # of gated_linear_attention; None: the fastest for device and shape
    chunk_size: Size | None = None  # steps per chunk of the chunked form; None: the fastest for the device

    @classmethod
    def paper(cls) -> "Config":
        """The published sizes (arXiv 2405.21060, section 9.2 and appendix D): N = 128, P = 64."""
        return cls(head_dim=64, d_state=128)


class State(NamedTuple):
    tail: Float[Array, "B tail X"]  # the last W - 1 inputs of the convolution, E + 2 G N wide
    memory: Float[Array, "B H N P"]  # S


class Mixer(nnx.Module):
    """Mamba-2 behind the interface of a mixer."""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        inner = config.expand * d_model
        self.config, self.inner = config, inner
        self.num_heads, odd = divmod(inner, config.head_dim)
        prefix = "model.mixers.mamba2"
        if odd:
            raise UserError(
                f"{prefix}.head_dim={config.head_dim} must divide the inner width {inner} "
                f"(expand={config.expand} times model.d_model={d_model})"
            )
        if self.num_heads % config.num_groups:
            raise UserError(
                f"{prefix}.num_groups={config.num_groups} must divide the {self.num_heads} heads "
                f"(inner width {inner} by head_dim={config.head_dim})"
            )
        self.mixed = inner + 2 * config.num_groups * config.d_state
        self.input_kernel = Weight(fan_in_uniform_init(rngs.params(), (d_model, self.mixed)))
        self.gate_kernel = Weight(fan_in_uniform_init(rngs.params(), (d_model, inner)))
        self.dt_kernel = NoWeightDecay(fan_in_uniform_init(rngs.params(), (d_model, self.num_heads)))
        self.conv_kernel = Weight(fan_in_uniform_init(rngs.params(), (config.conv_width, self.mixed)))
        self.conv_bias = nnx.Param(fan_in_uniform_init(rngs.params(), (config.conv_width, self.mixed))[0])
        self.dt_bias = nnx.Param(step_size_bias_init(rngs.params(), (self.num_heads,)))
        self.A_log = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (self.num_heads,), jnp.float32, 1.0, 16.0)))
        self.D = nnx.Param(jnp.ones((self.num_heads,), jnp.float32))
        self.norm_scale = nnx.Param(jnp.ones((inner,), jnp.float32))
        self.output_kernel = Weight(fan_in_uniform_init(rngs.params(), (inner, d_model)))

    def init_state(self, batch_size: int, max_len: int) -> State:
        """Zeros; the size does not depend on ``max_len``."""
        tail = jnp.zeros((batch_size, self.config.conv_width - 1, self.mixed), jnp.float32)
        shape = (batch_size, self.num_heads, self.config.d_state, self.config.head_dim)
        return State(tail, jnp.zeros(shape, jnp.float32))

    def state_space(
        self,
        x: Float[Array, "B T H P"],
        dt_logit: Float[Array, "B T H"],
        B: Float[Array, "B T G N"],
        C: Float[Array, "B T G N"],
        memory: Float[Array, "B H N P"] | None,
        reset: Bool[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T H P"], Float[Array, "B H N P"]]:
        """o and the last S from the inputs of the heads; ``dt_logit`` is what the softplus is taken of, less its bias."""
        dt = jax.nn.softplus(dt_logit.astype(jnp.float32) + self.dt_bias[...])
        if self.config.dt_smallest > 0.0 or self.config.dt_largest is not None:
            dt = jnp.clip(dt, self.config.dt_smallest, self.config.dt_largest)
        wide = x.astype(jnp.float32)
        o, memory = gated_linear_attention(
            C,
            B,
            (dt[..., None] * wide).astype(x.dtype),
            (dt * -jnp.exp(self.A_log[...]))[..., None],
            state=memory,
            reset=reset,
            implementation=self.config.implementation,
            chunk_size=self.config.chunk_size,
        )
        return (o.astype(jnp.float32) + self.D[...][:, None] * wide).astype(x.dtype), memory

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, *, reset: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        """Mixes T steps that follow those of ``state``; ``reset`` marks the steps at which a new document starts."""
        batch, T, _ = x.shape
        H, P, G, N = self.num_heads, self.config.head_dim, self.config.num_groups, self.config.d_state
        tail, memory = (None, None) if state is None else state
        mixed, tail = causal_conv(
            dense(x, self.input_kernel[...]), self.conv_kernel[...], self.conv_bias[...], state=tail, reset=reset
        )
        values, B, C = jnp.split(jax.nn.silu(mixed), [self.inner, self.inner + G * N], axis=-1)
        o, memory = self.state_space(
            values.reshape(batch, T, H, P),
            dense(x, self.dt_kernel[...]),
            B.reshape(batch, T, G, N),
            C.reshape(batch, T, G, N),
            memory,
            reset,
        )
        y = gated_rms_norm(
            o.reshape(batch, T, self.inner),
            dense(x, self.gate_kernel[...]),
            self.norm_scale[...],
            eps=self.config.norm_eps,
            num_groups=G,
        )
        return dense(y, self.output_kernel[...]), State(tail, memory)
