"""Kimi delta attention (KDA): the delta rule on a memory whose every key channel fades at a rate read from the token.

    q_t, k_t, v_t = silu(conv(x W_in)_t)                     causal, depthwise, W steps; split into heads
    q_t, k_t = q_t / |q_t|, k_t / |k_t|                      |.| = sqrt(sum of squares + 1e-6)
    beta_t = sigmoid(x_t W_beta)                             one per head; twice that with allow_neg_eigval
    dt_t = softplus(x_t W_1 W_2 + b_dt)                      one per key channel
    S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T,   alpha_t = exp(-exp(A_log) dt_t)
    o_t = RMSNorm(K^-1/2 q_t^T S_t)                          in every head
    y_t = (sigmoid(x_t W_3 W_4 + b_g) * concat(o_t)) W_o

A_log is one number per head. With ``log_decay_floor`` f < 0, log(alpha_t) = f sigmoid(exp(A_log) (x_t W_1 W_2 + b_dt))
instead: never below f.

"Kimi Linear: an expressive, efficient attention architecture", arXiv 2510.26692, eq. 1; decay, initialisation
and floor are those of its authors' code (flash-linear-attention).

State: K V numbers per head, and the last W - 1 inputs of the convolution, H (2 K + V) each; all float32.

Numerical trap: alpha_t is never formed, its logarithm is, in float32, and may be any negative number: the op
multiplies by decays only, so that no floor is needed. A step contracts the memory only while beta |k|^2 is within
[0, 2], so that keys are normalised in float32.

Parameters: 4 D^2 + (3 W + H + 2 decay_rank + 2 gate_rank + 2) D + H + D / H with the default expansions.

Deviations from the paper: heads of any width and ranks of 16, where the paper has heads of 128 channels and ranks as
large (``paper``). The projections start normal with deviation 1/sqrt(fan in) as everywhere in this project
(flash-linear-attention: 0.02 at every width), b_g at zero, the convolution like torch's.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from seqmodels.layers import (
    NoWeightDecay,
    RMSNorm,
    Weight,
    delta_beta,
    delta_inputs,
    dense,
    fan_in_uniform_init,
    head_widths,
    normal_init,
    step_size_bias_init,
)
from seqmodels.ops.delta_rule import delta_rule
from seqmodels.ops.dispatch import Implementation
from seqmodels.ranges import Below, Checked, Epsilon, Expansion, Size, Taps


@dataclasses.dataclass(frozen=True)
class Config(Checked, where="model.mixers.kda"):
    num_heads: Size = 4  # H; divides the widths of keys and values
    key_expansion: Expansion = 1.0  # H K = key_expansion d_model
    value_expansion: Expansion = 1.0  # H V = value_expansion d_model
    conv_width: Taps = 4  # W, steps the convolution sees
    decay_rank: Size = 16  # width between W_1 and W_2; the paper has V
    gate_rank: Size = 16  # width between W_3 and W_4; the paper has V
    log_decay_floor: Annotated[float | None, Below(0)] = None  # f, below which no log decay goes, like -5; None: no floor
    allow_neg_eigval: bool = False  # beta up to 2, at which the memory under a key changes sign
    norm_eps: Epsilon = 1e-5  # of the heads' RMSNorm
    implementation: Implementation | None = None  # of delta_rule; None: the fastest for device and shape
    chunk_size: Size | None = None  # steps per chunk of the chunked form; None: the fastest for the device

    @classmethod
    def paper(cls, d_model: int) -> "Config":
        """The published sizes: K = V = 128, ranks of 128 (arXiv 2510.26692); d_model a multiple of 128."""
        return cls(num_heads=d_model // 128, decay_rank=128, gate_rank=128)


class State(NamedTuple):
    tail: Float[Array, "B tail X"]  # the last W - 1 inputs of the convolution, H (2 K + V) wide
    memory: Float[Array, "B H K V"]  # S


class Mixer(nnx.Module):
    """Kimi delta attention behind the interface of a mixer."""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        self.config = config
        self.key_dim, self.value_dim = int(config.key_expansion * d_model), int(config.value_expansion * d_model)
        self.key_head_dim, self.value_head_dim = head_widths(config, d_model, keys=self.key_dim, values=self.value_dim)
        self.mixed = 2 * self.key_dim + self.value_dim
        self.input_kernel = Weight(normal_init(rngs.params(), (d_model, self.mixed)))
        self.conv_kernel = Weight(fan_in_uniform_init(rngs.params(), (config.conv_width, self.mixed)))
        self.beta_kernel = Weight(normal_init(rngs.params(), (d_model, config.num_heads)))
        self.dt_in_kernel = NoWeightDecay(normal_init(rngs.params(), (d_model, config.decay_rank)))
        self.dt_out_kernel = NoWeightDecay(normal_init(rngs.params(), (config.decay_rank, self.key_dim)))
        self.dt_bias = nnx.Param(step_size_bias_init(rngs.params(), (self.key_dim,)))
        A = jax.random.uniform(rngs.params(), (config.num_heads,), jnp.float32, 1.0, 16.0)
        self.A_log = nnx.Param(jnp.log(A))
        self.gate_in_kernel = Weight(normal_init(rngs.params(), (d_model, config.gate_rank)))
        self.gate_out_kernel = Weight(normal_init(rngs.params(), (config.gate_rank, self.value_dim)))
        self.gate_bias = nnx.Param(jnp.zeros((self.value_dim,), jnp.float32))
        self.head_norm = RMSNorm(self.value_head_dim, eps=config.norm_eps, rngs=rngs)
        self.output_kernel = Weight(normal_init(rngs.params(), (self.value_dim, d_model)))

    def init_state(self, batch_size: int, max_len: int) -> State:
        """Zeros; the size does not depend on ``max_len``."""
        tail = jnp.zeros((batch_size, self.config.conv_width - 1, self.mixed), jnp.float32)
        shape = (batch_size, self.config.num_heads, self.key_head_dim, self.value_head_dim)
        return State(tail, jnp.zeros(shape, jnp.float32))

    def log_decay(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H K"]:
        """log(alpha_t) of every key channel, float32."""
        logit = dense(dense(x, self.dt_in_kernel[...]), self.dt_out_kernel[...]).astype(jnp.float32)
        logit = (logit + self.dt_bias[...]).reshape(*x.shape[:2], self.config.num_heads, self.key_head_dim)
        A = jnp.exp(self.A_log[...])[:, None]
        if self.config.log_decay_floor is not None:
            return self.config.log_decay_floor * jax.nn.sigmoid(A * logit)
        return -A * jax.nn.softplus(logit)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, *, reset: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        """Mixes T steps that follow those of ``state``; ``reset`` marks the steps at which a new document starts."""
        B, T, _ = x.shape
        H, K, V = self.config.num_heads, self.key_head_dim, self.value_head_dim
        tail, memory = (None, None) if state is None else state
        q, k, v, tail = delta_inputs(
            x, self.input_kernel[...], self.conv_kernel[...], tail=tail, reset=reset, key_heads=(H, K), value_heads=(H, V)
        )
        o, memory = delta_rule(
            q,
            k,
            v,
            delta_beta(x, self.beta_kernel[...], self.config.allow_neg_eigval),
            self.log_decay(x),
            state=memory,
            reset=reset,
            implementation=self.config.implementation,
            chunk_size=self.config.chunk_size,
        )
        gate_logit = dense(dense(x, self.gate_in_kernel[...]), self.gate_out_kernel[...])
        gate = jax.nn.sigmoid(gate_logit + self.gate_bias[...].astype(x.dtype))
        y = gate * self.head_norm(o).reshape(B, T, H * V)
        return dense(y, self.output_kernel[...]), State(tail, memory)
