"""DeltaNet: a linear attention that corrects what its memory answers to a key, instead of adding to it.

    q_t, k_t, v_t = silu(conv(x W_in)_t)                     causal, depthwise, W steps; split into heads
    q_t, k_t = q_t / |q_t|, k_t / |k_t|                      |.| = sqrt(sum of squares + 1e-6)
    beta_t = sigmoid(x_t W_beta)                             one per head; twice that with allow_neg_eigval
    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
    o_t = RMSNorm(K^-1/2 q_t^T S_t)                          in every head
    y_t = concat(o_t) W_o

"Parallelizing linear transformers with the delta rule over sequence length", arXiv 2406.06484; twice the sigmoid:
arXiv 2411.12537. The layer is that of the authors' code (flash-linear-attention).

State: K V numbers per head, and the last W - 1 inputs of the convolution, H (2 K + V) each; all float32.

Numerical trap: a step contracts the memory only while beta |k|^2 is within [0, 2], so that keys are normalised in
float32; a chunk inverts a matrix of the overlaps of its keys, which no series does where keys are alike
(``delta_rule.py``).

Parameters: 4 D^2 + (3 W + H) D + D / H with the default expansions.

Deviations from the paper: heads of any width (the paper's have 128 channels: ``paper``). The projections start normal
with deviation 1/sqrt(fan in) as everywhere in this project (flash-linear-attention: 0.02 at every width), the
convolution like torch's.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from seqmodels.layers import (
    RMSNorm,
    Weight,
    delta_beta,
    delta_inputs,
    dense,
    fan_in_uniform_init,
    head_widths,
    normal_init,
)
from seqmodels.ops.delta_rule import delta_rule
from seqmodels.ops.dispatch import Implementation
from seqmodels.ranges import Checked, Epsilon, Expansion, Size, Taps


@dataclasses.dataclass(frozen=True)
class Config(Checked, where="model.mixers.deltanet"):
    num_heads: Size = 4  # H; divides the widths of keys and values
    key_expansion: Expansion = 1.0  # H K = key_expansion d_model
    value_expansion: Expansion = 1.0  # H V = value_expansion d_model
    conv_width: Taps = 4  # W, steps the convolution sees
    allow_neg_eigval: bool = False  # beta up to 2, at which the memory under a key changes sign
    norm_eps: Epsilon = 1e-5  # of the heads' RMSNorm
    implementation: Implementation | None = None  # of delta_rule; None: the fastest for device and shape
    chunk_size: Size | None = None  # steps per chunk of the chunked form; None: the fastest for the device

    @classmethod
    def paper(cls, d_model: int) -> "Config":
        """The published sizes: K = V = 128 (arXiv 2406.06484); d_model a multiple of 128."""
        return cls(num_heads=d_model // 128)


class State(NamedTuple):
    tail: Float[Array, "B tail X"]  # the last W - 1 inputs of the convolution, H (2 K + V) wide
    memory: Float[Array, "B H K V"]  # S


class Mixer(nnx.Module):
    """DeltaNet behind the interface of a mixer."""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        self.config = config
        self.key_dim, self.value_dim = int(config.key_expansion * d_model), int(config.value_expansion * d_model)
        self.key_head_dim, self.value_head_dim = head_widths(config, d_model, keys=self.key_dim, values=self.value_dim)
        self.mixed = 2 * self.key_dim + self.value_dim
        self.input_kernel = Weight(normal_init(rngs.params(), (d_model, self.mixed)))
        self.conv_kernel = Weight(fan_in_uniform_init(rngs.params(), (config.conv_width, self.mixed)))
        self.beta_kernel = Weight(normal_init(rngs.params(), (d_model, config.num_heads)))
        self.head_norm = RMSNorm(self.value_head_dim, eps=config.norm_eps, rngs=rngs)
        self.output_kernel = Weight(normal_init(rngs.params(), (self.value_dim, d_model)))

    def init_state(self, batch_size: int, max_len: int) -> State:
        """Zeros; the size does not depend on ``max_len``."""
        tail = jnp.zeros((batch_size, self.config.conv_width - 1, self.mixed), jnp.float32)
        shape = (batch_size, self.config.num_heads, self.key_head_dim, self.value_head_dim)
        return State(tail, jnp.zeros(shape, jnp.float32))

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
            state=memory,
            reset=reset,
            implementation=self.config.implementation,
            chunk_size=self.config.chunk_size,
        )
        return dense(self.head_norm(o).reshape(B, T, H * V), self.output_kernel[...]), State(tail, memory)
