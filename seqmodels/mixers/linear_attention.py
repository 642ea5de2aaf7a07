"""Linear attention: softmax's exponential replaced by a feature map, so that the past fits in a matrix.

    q_t, k_t, v_t = x_t W_q, x_t W_k, x_t W_v                            split into heads of width K
    S_t = S_{t-1} + phi(k_t) v_t^T        z_t = z_{t-1} + phi(k_t)
    o_t = phi(q_t)^T S_t / (phi(q_t) . z_t + eps)                        in every head
    y_t = concat(o_t) W_o

"Transformers are RNNs", arXiv 2006.16236: eq. 5 (feature maps), 7 (phi = elu + 1), 18-20 (the recurrence); eps as in its
authors' fast-transformers. Without the normaliser, ``o_t = RMSNorm(K^-1/2 phi(q_t)^T S_t)`` in every head
("The Devil in Linear Transformer", arXiv 2210.10340; the scale is flash-linear-attention's, which also has the norm after
the normaliser: ``norm_eps``).

State: (V + 1) K numbers per head in float32, the last column being z (V K without the normaliser), whatever was read; with a
convolution also its last ``conv_width - 1`` inputs.

Numerical trap: nothing decays, so S and z grow with the text, and their quotient is what stays moderate: both are
float32 and are divided in float32. A feature map that can be negative would let the denominator pass through zero.

Deviations from the paper: no bias; the feature maps beside elu + 1 are options of this project, and so is a short causal
convolution with SiLU over q, k and v (``conv_width``), which linear attention has in later work (arXiv 2402.18668, 2406.06484).
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from seqmodels.errors import UserError
from seqmodels.layers import RMSNorm, Weight, dense, fan_in_uniform_init, normal_init
from seqmodels.ops.causal_conv import causal_conv
from seqmodels.ops.dispatch import Implementation
from seqmodels.ops.gated_linear_attention import gated_linear_attention
from seqmodels.ranges import Checked, Epsilon, OneOf, Size, TapsOrZero

FEATURE_MAPS: dict[str, Callable[[Array], Array]] = {
    "elu": lambda x: jax.nn.elu(x) + 1.0,
    "relu": jax.nn.relu,
    "softmax": jax.nn.softmax,  # over the features of a head, as arXiv 1812.01243 does to queries
    "identity": lambda x: x,
}
SIGNED_FEATURE_MAPS = ("identity",)


@dataclasses.dataclass(frozen=True)
class Config(Checked, where="model.mixers.linear_attention"):
    num_heads: Size = 4  # H; divides d_model, K = V = d_model / num_heads
    # phi: elu (elu(x) + 1), relu, softmax, or identity (without the normaliser only)
    feature_map: Annotated[str, OneOf(FEATURE_MAPS)] = "elu"
    normalize: bool = True  # divide by phi(q) . z; without it, RMSNorm in every head
    eps: Epsilon = 1e-6  # added to the denominator, or inside the RMSNorm that replaces it
    norm_eps: Epsilon | None = None  # of an RMSNorm in every head after the normaliser; None: there is none
    conv_width: TapsOrZero = 0  # W, steps that a causal convolution with SiLU over q, k and v sees, before phi; 0: there is none
    implementation: Implementation | None = None  # of gated_linear_attention; None: the fastest for device and shape
    chunk_size: Size | None = None  # steps per chunk of the chunked form; None: the fastest for the device

    def __post_init__(self):
        super().__post_init__()
        if self.normalize and self.feature_map in SIGNED_FEATURE_MAPS:
            raise UserError(
                f"{self.where}.feature_map={self.feature_map!r} takes both signs, so its sum can be zero: "
                "set normalize=False or choose another feature map"
            )
        if self.norm_eps is not None and not self.normalize:
            raise UserError(f"{self.where}.norm_eps={self.norm_eps} is for normalize=True; without it eps is the RMSNorm's")


Memory = Float[Array, "B H K columns"]
"""S, and z as its last column where there is a normaliser."""


class StateWithTail(NamedTuple):
    tail: Float[Array, "B tail X"]  # the last W - 1 inputs of the convolution, 3 d_model wide
    memory: Memory


State = Memory | StateWithTail
"""The latter where there is a convolution."""


class Mixer(nnx.Module):
    """Linear attention behind the interface of a mixer.

    Raises:
      UserError: ``num_heads`` does not divide ``d_model``.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        if d_model % config.num_heads:
            raise UserError(f"model.mixers.linear_attention.num_heads={config.num_heads} must divide model.d_model={d_model}")
        self.config = config
        self.head_dim = d_model // config.num_heads
        self.query_kernel = Weight(normal_init(rngs.params(), (d_model, d_model)))
        self.key_kernel = Weight(normal_init(rngs.params(), (d_model, d_model)))
        self.value_kernel = Weight(normal_init(rngs.params(), (d_model, d_model)))
        self.output_kernel = Weight(normal_init(rngs.params(), (d_model, d_model)))
        if config.conv_width:
            self.conv_kernel = Weight(fan_in_uniform_init(rngs.params(), (config.conv_width, 3 * d_model)))
        if not config.normalize or config.norm_eps is not None:
            self.output_norm = RMSNorm(self.head_dim, eps=config.norm_eps or config.eps, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int) -> State:
        """Zeros; the size does not depend on ``max_len``."""
        columns = self.head_dim + self.config.normalize
        memory = jnp.zeros((batch_size, self.config.num_heads, self.head_dim, columns), jnp.float32)
        if not self.config.conv_width:
            return memory
        width = 3 * self.config.num_heads * self.head_dim
        return StateWithTail(jnp.zeros((batch_size, self.config.conv_width - 1, width), jnp.float32), memory)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, *, reset: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        """Mixes T steps that follow those of ``state``; ``reset`` marks the steps at which a new document starts."""
        B, T, _ = x.shape
        heads = (B, T, self.config.num_heads, self.head_dim)
        phi = FEATURE_MAPS[self.config.feature_map]
        mixed = [dense(x, kernel[...]) for kernel in (self.query_kernel, self.key_kernel, self.value_kernel)]
        tail, memory = (None, state) if not self.config.conv_width or state is None else state
        if self.config.conv_width:
            mixed, tail = causal_conv(jnp.concatenate(mixed, axis=-1), self.conv_kernel[...], state=tail, reset=reset)
            mixed = jnp.split(jax.nn.silu(mixed), 3, axis=-1)
        q, k, v = (each.reshape(heads) for each in mixed)
        q, k = phi(q), phi(k)
        if self.config.normalize:
            # A float32 v makes the op's outputs float32: numerator and denominator are not rounded before the division.
            v = jnp.concatenate([v.astype(jnp.float32), jnp.ones((*heads[:-1], 1), jnp.float32)], axis=-1)
        else:
            q = q * self.head_dim**-0.5
        o, memory = gated_linear_attention(
            q, k, v, state=memory, reset=reset, implementation=self.config.implementation, chunk_size=self.config.chunk_size
        )
        if self.config.normalize:
            o = (o[..., :-1] / (o[..., -1:] + self.config.eps)).astype(x.dtype)
        if not self.config.normalize or self.config.norm_eps is not None:
            o = self.output_norm(o)
        return dense(o.reshape(x.shape), self.output_kernel[...]), memory if tail is None else StateWithTail(tail, memory)
