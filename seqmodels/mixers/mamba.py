"""Mamba: a diagonal state space model that chooses, token by token, what to remember (S6).

    u_t = silu(conv(x W_x)_t),   z_t = x_t W_z                              causal, depthwise, W steps
    [r_t, B_t, C_t] = u_t W_s,   dt_t = softplus(r_t W_dt + b_dt)           dt >= 0, one per channel
    h_t = exp(dt_t A) * h_{t-1} + (dt_t * u_t) B_t^T,   A = -exp(A_log)     [E, N]
    y_t = (silu(z_t) * (h_t C_t + D * u_t)) W_o

"Mamba: linear-time sequence modeling with selective state spaces", arXiv 2312.00752, algorithm 2, figure 3 and
section 3.6; the initialisation is that of its authors' code.

Table 1 of arXiv 2312.06635: G_t = exp(-(1ᵀα_t) ⊙ exp(A)), α_t = softplus(x_t W_1 W_2)

State: E N numbers, and the last W - 1 inputs of the convolution, E each; all float32.

Numerical trap: dt A reaches -34 in practice, so that nothing may divide by a decay; softplus, A_log, D and the
scan are float32 whatever the activations are.

Parameters: 3 E D + E (2 R + 2 N) + E (N + W + 3), R = ceil(D / 16): 6 D^2 with E = 2 D, and at D = 128 another D^2 for the
rest. The block stands alone in the paper: two of them replace attention and an MLP.

Deviations from the paper: B is discretised as dt B (Euler), as in the authors' code; the paper writes
zero-order hold. Their in_proj is two kernels here.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from seqmodels.layers import NoWeightDecay, Weight, dense, fan_in_uniform_init, rms_norm, step_size_bias_init
from seqmodels.ops.causal_conv import causal_conv
from seqmodels.ops.dispatch import Implementation
from seqmodels.ops.selective_scan import selective_scan
from seqmodels.ranges import AtMost, Checked, Epsilon, Size, Taps

PATTERN = "mamba mamba"
"""The layers that replace "attention mlp"."""


@dataclasses.dataclass(frozen=True)
class Config(Checked, where="model.mixers.mamba"):
    expand: Annotated[Size, AtMost(1024)] = 2  # E = expand d_model, the inner width
    d_state: Size = 16  # N, numbers of state per channel
    conv_width: Taps = 4  # W, steps the convolution sees
    dt_rank: Size | None = None  # R, width of the step sizes' low-rank projection; None: ceil(d_model / 16)
    selection_norm: bool = False  # FalconMamba's RMSNorm without scale on each of r, B and C
    selection_norm_eps: Epsilon = 1e-6  # its epsilon
    implementation: Implementation | None = None  # of selective_scan; None: the fastest for device and shape
    chunk_size: Size | None = None  # steps per chunk of the chunked form; None: the fastest for the device

    @classmethod
    def paper(cls) -> "Config":
        """The published sizes (arXiv 2312.00752, section 3.4 and appendix E.2), which are the defaults."""
        return cls()


class State(NamedTuple):
    tail: Float[Array, "B tail E"]  # the last W - 1 inputs of the convolution
    h: Float[Array, "B E N"]


class Mixer(nnx.Module):
    """Mamba behind the interface of a mixer."""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        inner, N = config.expand * d_model, config.d_state
        rank = -(-d_model // 16) if config.dt_rank is None else config.dt_rank
        self.config, self.inner, self.rank = config, inner, rank
        self.input_kernel = Weight(fan_in_uniform_init(rngs.params(), (d_model, inner)))
        self.gate_kernel = Weight(fan_in_uniform_init(rngs.params(), (d_model, inner)))
        self.conv_kernel = Weight(fan_in_uniform_init(rngs.params(), (config.conv_width, inner)))
        conv_bias = fan_in_uniform_init(rngs.params(), (config.conv_width, inner))[0]
        self.conv_bias = nnx.Param(conv_bias)
        self.selection_kernel = Weight(fan_in_uniform_init(rngs.params(), (inner, rank + 2 * N)))
        self.dt_kernel = NoWeightDecay(fan_in_uniform_init(rngs.params(), (rank, inner)))
        self.dt_bias = nnx.Param(step_size_bias_init(rngs.params(), (inner,)))
        states = jnp.arange(1, N + 1, dtype=jnp.float32)
        self.A_log = NoWeightDecay(jnp.broadcast_to(jnp.log(states), (inner, N)))
        self.D = nnx.Param(jnp.ones((inner,), jnp.float32))
        self.output_kernel = Weight(fan_in_uniform_init(rngs.params(), (inner, d_model)))

    def init_state(self, batch_size: int, max_len: int) -> State:
        """Zeros; the size does not depend on ``max_len``."""
        tail = jnp.zeros((batch_size, self.config.conv_width - 1, self.inner), jnp.float32)
        return State(tail, jnp.zeros((batch_size, self.inner, self.config.d_state), jnp.float32))

    def selection(self, u: Float[Array, "B T E"]) -> tuple[Float[Array, "B T E"], Float[Array, "B T N"], Float[Array, "B T N"]]:
        """The step sizes dt (float32), B and C that the channels' inputs choose."""
        N = self.config.d_state
        r, B, C = jnp.split(dense(u, self.selection_kernel[...]), [self.rank, self.rank + N], axis=-1)
        if self.config.selection_norm:
            r, B, C = (rms_norm(part, eps=self.config.selection_norm_eps) for part in (r, B, C))
        dt = dense(r, self.dt_kernel[...]).astype(jnp.float32)
        return jax.nn.softplus(dt + self.dt_bias[...]), B, C

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, *, reset: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        """Mixes T steps that follow those of ``state``; ``reset`` marks the steps at which a new document starts."""
        tail, h = (None, None) if state is None else state
        u, tail = causal_conv(
            dense(x, self.input_kernel[...]), self.conv_kernel[...], self.conv_bias[...], state=tail, reset=reset
        )
        u = jax.nn.silu(u)
        dt, B, C = self.selection(u)
        y, h = selective_scan(
            u,
            dt,
            -jnp.exp(self.A_log[...]),
            B,
            C,
            state=h,
            reset=reset,
            implementation=self.config.implementation,
            chunk_size=self.config.chunk_size,
        )
        y = y.astype(jnp.float32) + self.D[...] * u.astype(jnp.float32)
        y = y.astype(x.dtype) * jax.nn.silu(dense(x, self.gate_kernel[...]))
        return dense(y, self.output_kernel[...]), State(tail, h)
