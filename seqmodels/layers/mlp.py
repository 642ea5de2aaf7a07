"""The gated MLP, a channel layer."""

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.errors import UserError
from seqmodels.layers.dense import dense
from seqmodels.layers.init import normal_init
from seqmodels.layers.parameters import Weight

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
        self.gate_kernel = Weight(normal_init(rngs.params(), (d_model, hidden)))
        self.up_kernel = Weight(normal_init(rngs.params(), (d_model, hidden)))
        self.output_kernel = Weight(normal_init(rngs.params(), (hidden, d_model)))
        self.activation = activation

    def init_state(self, batch_size: int, max_len: int) -> tuple[()]:
        return ()

    def __call__(self, x: Float[Array, "B T D"], state=None, *, reset=None) -> tuple[Float[Array, "B T D"], tuple[()]]:
        gate = ACTIVATIONS[self.activation](dense(x, self.gate_kernel[...]))
        return dense(gate * dense(x, self.up_kernel[...]), self.output_kernel[...]), ()
