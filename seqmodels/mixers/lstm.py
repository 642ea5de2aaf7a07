"""LSTM: the recurrent baseline everyone starts from, the one mixer here whose recurrence is nonlinear.

    [i, f, g, o]_t = x_t W_x + b + h_{t-1} W_h
    c_t = sigmoid(f_t) c_{t-1} + sigmoid(i_t) tanh(g_t)
    h_t = sigmoid(o_t) tanh(c_t)
    y_t = h_t W_o

Hochreiter and Schmidhuber, "Long short-term memory", 1997, with the forget gate of Gers, Schmidhuber and Cummins,
2000 (arXiv 1503.04069, section 2, without its peepholes, is this cell).

State: h and c, 2 E numbers in float32.

Numerical trap: none in the values: sigmoid and tanh bound everything. The price is in time: the steps follow one another,
with a small matrix product in each, on every device.

Parameters: 4 D E + 4 E^2 + 4 E + E D. The default E, about 0.55 D, makes this the 4 D^2 of attention.

Deviations from the paper: a residual layer with a projection y = h W_o and the norm before it, as every mixer here, and an MLP
after it, as in the sLSTM blocks of xLSTM (arXiv 2405.04517, section 2.4): a wider LSTM of as many parameters without MLPs learns
less (docs/starts.md). One bias where torch adds two. Initialised like Keras's LSTM: Glorot's uniform W_x, orthogonal W_h, forget
bias 1 (Jozefowicz et al. 2015, section 4).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from seqmodels.layers import Weight, dense, normal_init, xavier_uniform_init
from seqmodels.ops.dispatch import Implementation
from seqmodels.ops.lstm import LSTMState, lstm
from seqmodels.ranges import Checked, Size


@dataclasses.dataclass(frozen=True)
class Config(Checked, where="model.mixers.lstm"):
    hidden_size: Size | None = None  # E; None: about 0.55 d_model, the parameters of attention
    forget_bias: float = 1.0  # initial bias of the forget gates; the larger, the longer a new network remembers
    implementation: Implementation | None = None  # recurrent or None: no other form exists


def default_hidden_size(d_model: int) -> int:
    """The multiple of 4 nearest to the E that solves 5 D E + 4 E^2 = 4 D^2."""
    return max(4, 4 * round(d_model * ((25 + 64) ** 0.5 - 5) / 8 / 4))


State = LSTMState


class Mixer(nnx.Module):
    """An LSTM behind the interface of a mixer."""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        self.config = config
        self.hidden_size = size = config.hidden_size or default_hidden_size(d_model)
        orthogonal = jax.nn.initializers.orthogonal()
        self.input_kernel = Weight(xavier_uniform_init(rngs.params(), (d_model, 4 * size)))
        self.recurrent_kernel = Weight(orthogonal(rngs.params(), (size, 4 * size), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((4 * size,), jnp.float32).at[size : 2 * size].set(config.forget_bias))
        self.output_kernel = Weight(normal_init(rngs.params(), (size, d_model)))

    def init_state(self, batch_size: int, max_len: int) -> State:
        """Zeros; the size does not depend on ``max_len``."""
        zeros = jnp.zeros((batch_size, self.hidden_size), jnp.float32)
        return State(h=zeros, c=zeros)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, *, reset: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        """Mixes T steps that follow those of ``state``; ``reset`` marks the steps at which a new document starts."""
        z = dense(x, self.input_kernel[...]) + self.bias[...].astype(x.dtype)
        h, state = lstm(z, self.recurrent_kernel[...], state=state, reset=reset, implementation=self.config.implementation)
        return dense(h, self.output_kernel[...]), state
