"""The parts architectures share: dense projections, RMSNorm, and the channel layers (gated MLP, RWKV's)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from seqmodels.errors import UserError
from seqmodels.ops.token_shift import token_shift


def normal_init(key: Array, shape: tuple[int, ...], stddev: float | None = None) -> Float[Array, "..."]:
    """Normal initialisation in float32; ``stddev=None`` means 1/sqrt(fan in), fan in = ``shape[-2]``."""
    stddev = shape[-2] ** -0.5 if stddev is None else stddev
    return stddev * jax.random.normal(key, shape, jnp.float32)


def xavier_uniform_init(key: Array, shape: tuple[int, int], *, gain: float = 1.0) -> Float[Array, "i o"]:
    """Uniform in +-gain sqrt(6 / (fan in + fan out)), float32 (Glorot and Bengio 2010, eq. 16, which has gain 1)."""
    bound = gain * (6.0 / sum(shape)) ** 0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def fan_in_uniform_init(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Uniform in +-1/sqrt(fan in), fan in = ``shape[-2]``, float32: torch's default for linear and depthwise layers."""
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def step_size_bias_init(
    key: Array, shape: tuple[int, ...], *, smallest: float = 1e-3, largest: float = 0.1
) -> Float[Array, "..."]:
    """Biases b for which softplus(b) is log-uniform in [smallest, largest] (arXiv 2312.00752, section 3.6), float32."""
    dt = jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(smallest), math.log(largest)))
    return dt + jnp.log(-jnp.expm1(-dt))


def matmul_precision(dtype) -> jax.lax.Precision:
    """float32 operands mean float32 products (not TF32 or bfloat16 passes); narrower dtypes are exact anyway."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def dense(x: Float[Array, "... i"], kernel: Float[Array, "i o"]) -> Float[Array, "... o"]:
    """``x @ kernel`` in the dtype of ``x`` (parameters are float32 and are cast here).

    The product is of two matrices, whatever axes ``x`` has in front: of a product with more axes XLA's CPU
    compiler writes the kernel's gradient as transposing copies and a product outside its fast library (measured at
    B 16, T 256, D 128: gated MLP, forward and backward, 62 ms of CPU time against 39).
    """
    rows = x.reshape(-1, x.shape[-1])
    y = jnp.matmul(rows, kernel.astype(x.dtype), precision=matmul_precision(x.dtype))
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def sinusoids(length: int, d_model: int, *, base: float = 10000.0) -> Float[Array, "T D"]:
    """Positions 0..T-1 as sines (even features) and cosines (odd) of wavelengths 2 pi .. 2 pi base (arXiv 1706.03762, 3.5)."""
    frequencies = base ** (-jnp.arange(0, d_model, 2) / d_model)
    angles = jnp.arange(length)[:, None] * frequencies
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(length, -1)[:, :d_model]


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "D"] | None = None, *, eps: float) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + eps) * scale, computed in float32 (arXiv 1910.07467, eq. 4)."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    if scale is not None:
        wide = wide * scale.astype(jnp.float32)
    return wide.astype(x.dtype)


def l2_norm(x: Float[Array, "... K"], *, eps: float = 1e-6) -> Float[Array, "... K"]:
    """x / sqrt(sum(x^2) + eps): length 1, or a little less for short x; in float32, returned in the dtype of ``x``."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + eps)).astype(x.dtype)


def gated_rms_norm(
    x: Float[Array, "... D"],
    gate: Float[Array, "... D"],
    scale: Float[Array, "D"] | None = None,
    *,
    eps: float,
    num_groups: int = 1,
) -> Float[Array, "... D"]:
    """RMSNorm of x * silu(gate), the mean taken over each of ``num_groups`` groups of neighbouring features.

    Mamba-2 gates before it normalises (arXiv 2405.21060, section 7.1); who gates after it writes ``silu(gate) *
    rms_norm(x)``. Computed in float32, returned in the dtype of ``x``.

    Raises:
      ValueError: the groups do not divide the features.
    """
    if x.shape[-1] % num_groups:
        raise ValueError(f"num_groups={num_groups} must divide the features of x {list(x.shape)}")
    wide = x.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))
    if num_groups > 1:  # one group keeps its shape: an axis of 1 costs XLA's CPU compiler a copy, and half the speed
        grouped = wide.reshape(*x.shape[:-1], num_groups, x.shape[-1] // num_groups)
        wide = rms_norm(grouped, eps=eps).reshape(x.shape)
    else:
        wide = rms_norm(wide, eps=eps)
    if scale is not None:
        wide = wide * scale.astype(jnp.float32)
    return wide.astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm over the last axis with a learned scale, initialised to 1."""

    def __init__(self, dim: int, *, eps: float = 1e-5, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_norm(x, self.scale[...], eps=self.eps)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis with a learned scale and bias, initialised to 1 and 0 (arXiv 1607.06450, eq. 4)."""

    def __init__(self, dim: int, *, eps: float = 1e-5, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        wide = rms_norm(wide - jnp.mean(wide, axis=-1, keepdims=True), self.scale[...], eps=self.eps)
        return (wide + self.bias[...]).astype(x.dtype)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}


def soft_cap(logits: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """cap tanh(logits / cap), which stays within +-cap; None: the logits as they are (arXiv 2408.00118, section 2)."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
}


def default_mlp_hidden(d_model: int) -> int:
    """8/3 d_model, up to a multiple of 32: as many parameters as an ungated MLP of 4 d_model (arXiv 2002.05202)."""
    return -(-8 * d_model // 3 // 32) * 32


class GatedMLP(nnx.Module):
    """y = (act(x W_gate) * (x W_up)) W_output, the GLU family of arXiv 2002.05202.

    A channel layer of the pattern: it has the interface of a mixer and an empty state.
    """

    def __init__(self, d_model: int, hidden: int, activation: str, *, rngs: nnx.Rngs):
        if activation not in ACTIVATIONS:
            raise UserError(f"model.mlp_activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")
        self.gate_kernel = nnx.Param(normal_init(rngs.params(), (d_model, hidden)))
        self.up_kernel = nnx.Param(normal_init(rngs.params(), (d_model, hidden)))
        self.output_kernel = nnx.Param(normal_init(rngs.params(), (hidden, d_model)))
        self.activation = activation

    def init_state(self, batch_size: int, max_len: int) -> tuple[()]:
        return ()

    def __call__(self, x: Float[Array, "B T D"], state=None, *, reset=None) -> tuple[Float[Array, "B T D"], tuple[()]]:
        gate = ACTIVATIONS[self.activation](dense(x, self.gate_kernel[...]))
        return dense(gate * dense(x, self.up_kernel[...]), self.output_kernel[...]), ()


class RWKVDepth(NamedTuple):
    """How deep a layer lies, in the two numbers RWKV's initialisation counts with."""

    reached: float | Float[Array, ""]  # l / (L - 1): 0 in the first block, 1 in the last; 0 where there is one block
    remaining: float | Float[Array, ""]  # 1 - l / L: 1 in the first block, 1/L in the last


def rwkv_depth(layer_index: int | Int[Array, ""], num_layers: int) -> RWKVDepth:
    """Published for blocks of a mixer and a channel layer, so two residual layers are a block here.

    In the pattern "rwkv6 mlp" layers 2 l and 2 l + 1 are block l of L, as published; in any other pattern depth
    grows at the same rate.

    Args:
      layer_index: of the residual layer, from 0; may be traced.
      num_layers: residual layers in the model.
    """
    block, blocks = layer_index // 2, -(-num_layers // 2)
    return RWKVDepth(block / max(blocks - 1, 1), 1.0 - block / blocks)


def default_rwkv_hidden(d_model: int) -> int:
    """As many parameters as the gated MLP's default, D^2 + 2 D F = 3 D F_gated: F = 3.5 d_model, which is published."""
    return (3 * default_mlp_hidden(d_model) - d_model) // 2


class RWKVChannelMix(nnx.Module):
    """y_t = sigmoid(x^r_t W_r) * (relu(x^k_t W_k)^2 W_output), x^i_t = x_t + (x_{t-1} - x_t) * mu_i, of RWKV-6.

    A channel layer of the pattern whose state is the last input, float32 (arXiv 2404.05892, section 4, and its
    authors' code, RWKV_CMix_x060, for the sizes and the initial mu; kernels start as everywhere here).

    Args:
      hidden: F, width of the squared ReLU.
      layer_index: of this layer among the model's residual layers, from 0; decides the initial mu alone.
      num_layers: how many of those there are.
    """

    def __init__(
        self,
        d_model: int,
        hidden: int,
        *,
        rngs: nnx.Rngs,
        layer_index: int | Int[Array, ""] = 0,
        num_layers: int = 1,
    ):
        mix = 1.0 - (jnp.arange(d_model, dtype=jnp.float32) / d_model) ** rwkv_depth(layer_index, num_layers).remaining
        self.d_model = d_model
        self.key_mix = nnx.Param(mix)
        self.receptance_mix = nnx.Param(jnp.copy(mix))
        self.key_kernel = nnx.Param(normal_init(rngs.params(), (d_model, hidden)))
        self.receptance_kernel = nnx.Param(normal_init(rngs.params(), (d_model, d_model)))
        self.output_kernel = nnx.Param(normal_init(rngs.params(), (hidden, d_model)))

    def init_state(self, batch_size: int, max_len: int) -> Float[Array, "B D"]:
        return jnp.zeros((batch_size, self.d_model), jnp.float32)

    def __call__(
        self, x: Float[Array, "B T D"], state: Float[Array, "B D"] | None = None, *, reset: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
        shifted, state = token_shift(x, state=state, reset=reset)
        xx = shifted - x
        x_k, x_r = (x + xx * mix[...].astype(x.dtype) for mix in (self.key_mix, self.receptance_mix))
        k = jnp.square(jax.nn.relu(dense(x_k, self.key_kernel[...])))
        receptance = jax.nn.sigmoid(dense(x_r, self.receptance_kernel[...]))
        return receptance * dense(k, self.output_kernel[...]), state


def dropout(x: Float[Array, "..."], rate: float, key: Array | None) -> Float[Array, "..."]:
    """Inverted dropout; the identity when ``rate`` is 0 or no key is given (evaluation)."""
    if rate == 0.0 or key is None:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros((), x.dtype))
