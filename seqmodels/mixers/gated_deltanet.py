"""Gated DeltaNet: the delta rule on a memory that also fades, at one rate per head read from the token.

    q_t, k_t, v_t = silu(conv(x W_in)_t)                     causal, depthwise, W steps; split into heads
    q_t, k_t = q_t / |q_t|, k_t / |k_t|                      |.| = sqrt(sum of squares + 1e-6)
    beta_t = sigmoid(x_t W_beta)                             one per value head; twice it with allow_neg_eigval
    dt_t = softplus(x_t W_dt + b_dt)                         one per value head
    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   alpha_t = exp(-exp(A_log) dt_t)
    o_t = RMSNorm(K^-1/2 q_t^T S_t)                          in every value head
    y_t = (silu(x_t W_g) * concat(o_t)) W_o

There may be a multiple of value heads; those of a group share q and k.

"Gated delta networks: improving Mamba2 with delta rule", arXiv 2412.06464, eq. 10; decay and sizes are
those of its authors' code (flash-linear-attention).

State: K V numbers per value head, and the last W - 1 inputs of the convolution, 2 H K + (value heads) V each; all
float32.

Numerical trap: alpha_t is never formed, its logarithm is, in float32, and may be any negative number. A step
contracts the memory only while beta |k|^2 is within [0, 2], so that keys are normalised in float32.

Parameters: 4 D^2 + 2 (W + H) D + 2 H + D / H with the default expansions.

Deviations from the paper: keys half and values as wide as the model, where the paper has 3/4 and 3/2 (6 D^2:
``paper``). The projections start normal with deviation 1/sqrt(fan in) as everywhere in this project
(flash-linear-attention: 0.02 at every width), the convolution like torch's.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from seqmodels.errors import UserError
from seqmodels.layers import (
    NoWeightDecay,
    RMSNorm,
    Weight,
    delta_beta,
    delta_inputs,
    dense,
    fan_in_uniform_init,
    normal_init,
    step_size_bias_init,
)
from seqmodels.ops.delta_rule import delta_rule
from seqmodels.ops.dispatch import Implementation
from seqmodels.ranges import Checked, Epsilon, Expansion, MultipleOf, Size, Taps


@dataclasses.dataclass(frozen=True)
class Config(Checked, where="model.mixers.gated_deltanet"):
    num_heads: Size = 4  # H of queries and keys; divides their width
    num_value_heads: Annotated[Size | None, MultipleOf("num_heads")] = None  # a multiple of num_heads; None: as many
    key_expansion: Expansion = 0.5  # H K = key_expansion d_model; the paper has 0.75
    value_expansion: Expansion = 1.0  # (value heads) V = value_expansion d_model; the paper has 1.5
    conv_width: Taps = 4  # W, steps the convolution sees
    allow_neg_eigval: bool = False  # beta up to 2, at which the memory under a key changes sign
    norm_eps: Epsilon = 1e-5  # of the heads' RMSNorm
    implementation: Implementation | None = None  # of delta_rule; None: the fastest for device and shape
    chunk_size: Size | None = None  # steps per chunk of the chunked form; None: the fastest for the device

    @classmethod
    def paper(cls, d_model: int) -> "Config":
        """The authors' sizes: K = 256, V = 512, 6 heads at d_model 2048; for d_model a multiple of 1024."""
        return cls(num_heads=3 * d_model // 1024, key_expansion=0.75, value_expansion=1.5)


class State(NamedTuple):
    tail: Float[Array, "B tail X"]  # the last W - 1 inputs of the convolution, queries, keys, values
    memory: Float[Array, "B H K V"]  # S of every value head


class Mixer(nnx.Module):
    """Gated DeltaNet behind the interface of a mixer."""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        self.config = config
        self.num_value_heads = config.num_heads if config.num_value_heads is None else config.num_value_heads
        self.key_dim, self.value_dim = int(config.key_expansion * d_model), int(config.value_expansion * d_model)
        self.key_head_dim, odd_keys = divmod(self.key_dim, config.num_heads)
        self.value_head_dim, odd_values = divmod(self.value_dim, self.num_value_heads)
        prefix = "model.mixers.gated_deltanet"
        if odd_keys or not self.key_dim:
            raise UserError(
                f"{prefix}.num_heads={config.num_heads} must divide the width of keys ({self.key_dim}), "
                f"which is model.d_model={d_model} times key_expansion={config.key_expansion}"
            )
        if odd_values or not self.value_dim:
            raise UserError(
                f"{prefix}.num_value_heads={self.num_value_heads} (default: num_heads) must divide the width of values "
                f"({self.value_dim}), which is model.d_model={d_model} times value_expansion={config.value_expansion}"
            )
        heads = self.num_value_heads
        self.mixed = 2 * self.key_dim + self.value_dim
        self.input_kernel = Weight(normal_init(rngs.params(), (d_model, self.mixed)))
        self.conv_kernel = Weight(fan_in_uniform_init(rngs.params(), (config.conv_width, self.mixed)))
        self.gate_kernel = Weight(normal_init(rngs.params(), (d_model, self.value_dim)))
        self.beta_kernel = Weight(normal_init(rngs.params(), (d_model, heads)))
        self.dt_kernel = NoWeightDecay(normal_init(rngs.params(), (d_model, heads)))
        self.dt_bias = nnx.Param(step_size_bias_init(rngs.params(), (heads,)))
        # A uniform in (0, 16]: zero has no logarithm.
        self.A_log = nnx.Param(jnp.log(16.0 * (1.0 - jax.random.uniform(rngs.params(), (heads,), jnp.float32))))
        self.head_norm = RMSNorm(self.value_head_dim, eps=config.norm_eps, rngs=rngs)
        self.output_kernel = Weight(normal_init(rngs.params(), (self.value_dim, d_model)))

    def init_state(self, batch_size: int, max_len: int) -> State:
        """Zeros; the size does not depend on ``max_len``."""
        tail = jnp.zeros((batch_size, self.config.conv_width - 1, self.mixed), jnp.float32)
        shape = (batch_size, self.num_value_heads, self.key_head_dim, self.value_head_dim)
        return State(tail, jnp.zeros(shape, jnp.float32))

    def log_decay(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H"]:
        """log(alpha_t) of every value head, float32."""
        dt = jax.nn.softplus(dense(x, self.dt_kernel[...]).astype(jnp.float32) + self.dt_bias[...])
        return -jnp.exp(self.A_log[...]) * dt

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, *, reset: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        """Mixes T steps that follow those of ``state``; ``reset`` marks the steps at which a new document starts."""
        B, T, _ = x.shape
        H, K, V = self.config.num_heads, self.key_head_dim, self.value_head_dim
        tail, memory = (None, None) if state is None else state
        q, k, v, tail = delta_inputs(
            x,
            self.input_kernel[...],
            self.conv_kernel[...],
            tail=tail,
            reset=reset,
            key_heads=(H, K),
            value_heads=(self.num_value_heads, V),
        )
        o, memory = delta_rule(
            q,
            k,
            v,
            delta_beta(x, self.beta_kernel[...], self.config.allow_neg_eigval),
            self.log_decay(x)[..., None],
            state=memory,
            reset=reset,
            implementation=self.config.implementation,
            chunk_size=self.config.chunk_size,
        )
        y = jax.nn.silu(dense(x, self.gate_kernel[...])) * self.head_norm(o).reshape(B, T, self.value_dim)
        return dense(y, self.output_kernel[...]), State(tail, memory)
