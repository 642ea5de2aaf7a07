"""RWKV-6's channel mixing, a channel layer, and the depths that RWKV's initialisation counts with."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from seqmodels.layers.dense import dense
from seqmodels.layers.init import normal_init
from seqmodels.layers.mlp import default_mlp_hidden
from seqmodels.layers.parameters import Weight
from seqmodels.ops.token_shift import token_shift


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
        self.key_kernel = Weight(normal_init(rngs.params(), (d_model, hidden)))
        self.receptance_kernel = Weight(normal_init(rngs.params(), (d_model, d_model)))
        self.output_kernel = Weight(normal_init(rngs.params(), (hidden, d_model)))

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
