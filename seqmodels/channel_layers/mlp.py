"""The gated MLP: y = (act(x W_gate) * (x W_up)) W_output, the GLU family of arXiv 2002.05202. It has no state."""

import dataclasses
from collections.abc import Callable
from typing import Annotated

import jax
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.layers import Weight, dense, normal_init
from seqmodels.ranges import Checked, OneOf, Size

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class Config(Checked, where="model.channel_layers.mlp"):
    hidden: Size | None = None  # F; None: 8/3 d_model, up to a multiple of 32
    activation: Annotated[str, OneOf(ACTIVATIONS)] = "silu"  # silu (SwiGLU), gelu (GEGLU) or relu (ReGLU)


def default_hidden(d_model: int) -> int:
    """8/3 d_model, up to a multiple of 32: as many parameters as an ungated MLP of 4 d_model (arXiv 2002.05202)."""
    return -(-8 * d_model // 3 // 32) * 32


class Layer(nnx.Module):
    """The gated MLP behind the interface of a channel layer, with an empty state."""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        hidden = config.hidden or default_hidden(d_model)
        self.gate_kernel = Weight(normal_init(rngs.params(), (d_model, hidden)))
        self.up_kernel = Weight(normal_init(rngs.params(), (d_model, hidden)))
        self.output_kernel = Weight(normal_init(rngs.params(), (hidden, d_model)))
        self.activation = config.activation

    def init_state(self, batch_size: int, max_len: int) -> tuple[()]:
        return ()

    def __call__(self, x: Float[Array, "B T D"], state=None, *, reset=None) -> tuple[Float[Array, "B T D"], tuple[()]]:
        gate = ACTIVATIONS[self.activation](dense(x, self.gate_kernel[...]))
        return dense(gate * dense(x, self.up_kernel[...]), self.output_kernel[...]), ()
