"""HGRN2: the forget gate is the key: what a channel of the memory lets in is what it forgets.

    alpha_t = gamma + (1 - gamma) sigmoid(x_t W_f)                                   one per key channel
    q_t, k_t, v_t = silu(x_t W_q), 1 - alpha_t, x_t W_v                              split into heads
    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T
    y_t = RMSNorm(concat(K^-1/2 q_t^T S_t)) W_o                                      over all heads together

"HGRN2: gated linear RNNs with state expansion", arXiv 2404.07904, section 3; the lower bounds gamma are those of HGRN
(arXiv 2311.04823, section 3.2): learned, zero in the first layer, growing with depth.

Table 1 of arXiv 2312.06635: G_t = α_tᵀ 1, α_t = γ + (1 - γ) σ(x_t W_α)

State: K V = K^2 numbers per head in float32.

Numerical trap: 1 - alpha_t and log(alpha_t) are both computed from the logit (``ops/lower_bounds.py``): taken from alpha_t,
either loses its digits where the gate is nearly open or closed. The first layer's bound of zero has no logarithm.

Parameters: 4 D^2 + 2 D.

Deviations from the paper: queries pass through silu and are scaled, and one RMSNorm spans the heads, as in
flash-linear-attention; the norm undoes the scale up to its epsilon. The paper's head has K = V = 128; the default here
is four heads at every width.

What crosses layers: the bounds need every layer's row of ``lower_bound_logit``. A model collects them (``init_shared``); a
mixer by itself is a first layer.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from seqmodels.errors import UserError
from seqmodels.layers import NoWeightDecay, RMSNorm, Weight, dense, normal_init
from seqmodels.ops.dispatch import Implementation
from seqmodels.ops.gated_linear_attention import gated_linear_attention
from seqmodels.ops.lower_bounds import LowerBounds, bounded_gate
from seqmodels.ranges import Checked, Epsilon, Size


@dataclasses.dataclass(frozen=True)
class Config(Checked, where="model.mixers.hgrn2"):
    num_heads: Size = 4  # H; K = V = d_model / H
    norm_eps: Epsilon = 1e-5  # of the RMSNorm over all heads
    implementation: Implementation | None = None  # of gated_linear_attention; None: the fastest for device and shape
    chunk_size: Size | None = None  # steps per chunk of the chunked form; None: the fastest for the device

    @classmethod
    def paper(cls, d_model: int) -> "Config":
        """The published expansion, K = V = 128 (arXiv 2404.07904, section 4); d_model is a multiple of 128."""
        return cls(num_heads=d_model // 128)


State = Float[Array, "B H K V"]
"""S."""


class Mixer(nnx.Module):
    """HGRN2 behind the interface of a mixer."""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        self.config = config
        self.head_dim, odd = divmod(d_model, config.num_heads)
        if odd:
            raise UserError(f"model.mixers.hgrn2.num_heads={config.num_heads} must divide model.d_model={d_model}")
        for name in ("query", "gate_logit", "value", "output"):
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
        return jnp.zeros((batch_size, self.config.num_heads, self.head_dim, self.head_dim), jnp.float32)

    def gate(self, x: Float[Array, "B T D"], bound: Float[Array, " D"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """log(alpha_t) and the key 1 - alpha_t of every channel, float32."""
        return bounded_gate(dense(x, self.gate_logit_kernel[...]), bound)

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
        B, T, D = x.shape
        bound = jnp.zeros((D,), jnp.float32) if shared is None else shared.current()
        log_decay, k = self.gate(x, bound)
        q = jax.nn.silu(dense(x, self.query_kernel[...])) * self.head_dim**-0.5
        v = dense(x, self.value_kernel[...])
        heads = (B, T, self.config.num_heads, self.head_dim)
        o, state = gated_linear_attention(
            q.reshape(heads),
            k.astype(x.dtype).reshape(heads),
            v.reshape(heads),
            log_decay.reshape(heads),
            state=state,
            reset=reset,
            implementation=self.config.implementation,
            chunk_size=self.config.chunk_size,
        )
        y = dense(self.norm(o.reshape(B, T, D)), self.output_kernel[...])
        return (y, state) if shared is None else (y, state, shared.next_layer())
