"""RWKV-6's channel mixing: y_t = sigmoid(x^r_t W_r) * (relu(x^k_t W_k)^2 W_output), x^i_t = x_t + (x_{t-1} - x_t) * mu_i.

arXiv 2404.05892, section 4, and its authors' code (RWKV_CMix_x060) for the sizes and the initial mu; kernels start as everywhere
here. The state is the last input, float32.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from seqmodels.channel_layers import mlp
from seqmodels.layers import Weight, dense, normal_init, rwkv_depth
from seqmodels.ops.token_shift import token_shift
from seqmodels.ranges import Checked, Size


@dataclasses.dataclass(frozen=True)
class Config(Checked, where="model.channel_layers.rwkv_channel_mix"):
    hidden: Size | None = None  # F; None: 3.5 d_model, as published


def default_hidden(d_model: int) -> int:
    """As many parameters as the gated MLP's default width F', D^2 + 2 D F = 3 D F': F = 3.5 d_model, which is published."""
    return (3 * mlp.default_hidden(d_model) - d_model) // 2


class Layer(nnx.Module):
    """RWKV-6's channel mixing behind the interface of a channel layer.

    Args:
      config: the options above.
      layer_index: of this layer among the model's residual layers, from 0; decides the initial mu alone.
      num_layers: how many of those there are.
    """

    def __init__(
        self,
        config: Config,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        layer_index: int | Int[Array, ""] = 0,
        num_layers: int = 1,
    ):
        hidden = config.hidden or default_hidden(d_model)
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
