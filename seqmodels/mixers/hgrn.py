"""HGRN: an elementwise recurrence whose input gate is what the forget gate leaves.

    alpha_t = gamma + (1 - gamma) sigmoid(x_t W_f)                                   one per channel
    h_t = alpha_t * h_{t-1} + (1 - alpha_t) * silu(x_t W_i)
    y_t = (RMSNorm(h_t) * silu(x_t W_g)) W_o

"Hierarchically gated recurrent neural network for sequence modeling", arXiv 2311.04823, section 3, with the real-valued
recurrence of its authors' later code; the lower bounds gamma (section 3.2) are learned, zero in the first layer, and grow
with depth.

State: D numbers in float32.

Numerical trap: as in HGRN2: 1 - alpha_t and log(alpha_t) are both computed from the logit (``ops/lower_bounds.py``).

Parameters: 4 D^2 + 2 D.

Deviations from the paper: the recurrence is real (the paper's is complex with a fixed angle), and the norm is
an RMSNorm before the output gate, both as in flash-linear-attention.

What crosses layers: the bounds need every layer's row of ``lower_bound_logit``. A model collects them (``init_shared``); a
mixer by itself is a first layer.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from seqmodels.layers import NoWeightDecay, RMSNorm, Weight, dense, normal_init
from seqmodels.ops.dispatch import Implementation
from seqmodels.ops.linear_recurrence import linear_recurrence
from seqmodels.ops.lower_bounds import LowerBounds, bounded_gate
from seqmodels.ranges import Checked, Epsilon


@dataclasses.dataclass(frozen=True)
class Config(Checked, where="model.mixers.hgrn"):
    norm_eps: Epsilon = 1e-5  # of the RMSNorm before the output gate
    implementation: Implementation | None = None  # of linear_recurrence; None: the fastest for device and shape

    @classmethod
    def paper(cls) -> "Config":
        """The published sizes (one state per channel of the model), which are the defaults."""
        return cls()


State = Float[Array, "B D"]
"""h."""


class Mixer(nnx.Module):
    """HGRN behind the interface of a mixer."""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        self.config = config
        self.d_model = d_model
        for name in ("input", "gate_logit", "gate", "output"):
            kind = NoWeightDecay if name == "gate_logit" else Weight
            setattr(self, f"{name}_kernel", kind(normal_init(rngs.params(), (d_model, d_model))))
        self.norm = RMSNorm(d_model, eps=config.norm_eps, rngs=rngs)
        self.lower_bound_logit = nnx.Param(jnp.zeros((d_model,), jnp.float32))

    @staticmethod
    def init_shared(layers: "Mixer") -> LowerBounds:
        """The ``shared`` of a model's first layer of this kind.

        Args:
          layers: all of them, their parameters stacked [layers, ...] in order of depth.
        """
        return LowerBounds.of_layers(layers.lower_bound_logit[...])

    def init_state(self, batch_size: int, max_len: int) -> State:
        """Zeros; the size does not depend on ``max_len``."""
        return jnp.zeros((batch_size, self.d_model), jnp.float32)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: State | None = None,
        *,
        reset: Bool[Array, "B T"] | None = None,
        shared: LowerBounds | None = None,
    ) -> tuple[Float[Array, "B T D"], State] | tuple[Float[Array, "B T D"], State, LowerBounds]:
        """Mixes T steps that follow those of ``state``; ``reset`` marks the steps at which a new document starts.

        With ``shared``, what the layer below passed on, the result has a third part: what this one passes on.
        """
        bound = jnp.zeros((self.d_model,), jnp.float32) if shared is None else shared.current()
        log_decay, input_gate = bounded_gate(dense(x, self.gate_logit_kernel[...]), bound)
        written = input_gate * jax.nn.silu(dense(x, self.input_kernel[...])).astype(jnp.float32)
        h, state = linear_recurrence(
            jnp.exp(log_decay), written, state=state, reset=reset, implementation=self.config.implementation
        )
        y = self.norm(h).astype(x.dtype) * jax.nn.silu(dense(x, self.gate_kernel[...]))
        y = dense(y, self.output_kernel[...])
        return (y, state) if shared is None else (y, state, shared.next_layer())
