"""H3: two state space models and two products, made to remember a token and to compare it with later ones.

    q_t, k_t, v_t = x_t W_q + b_q, x_t W_k + b_k, x_t W_v + b_v                      split into heads of width P
    k'_t = sum over l < W of kernel[l] k_{t-l} + D_k k_t,  kernel[l] = sum over n of B_n C_{n+l}      the shift SSM
    S_t = k'_t v_t^T,   s_t = SSM(S)_t + D S_t                                       the diagonal SSM, one per head
    y_t = (q_t^T s_t) W_o + b_o

"Hungry hungry hippos: towards language modeling with state space models", arXiv 2212.14052, section 3 and algorithm 1. With
P = 1, as published, the products are elementwise; with P > 1 every head has P x P inputs to the one diagonal SSM it has
(linear attention's outer product, remembered by an SSM instead of a sum).

State: the last W - 1 keys and the SSM's N numbers for each of the D P products, in float32.

Numerical trap: as in S4D, whose op this is: slow modes lose their rate in float32 unless dA - 1 is what is kept.

Parameters: 4 D^2 + (2 W + 5) D + (3 N + 2) D / P.

Deviations from the paper: none from its authors' code, whose discretisation is bilinear where the paper is silent; with P > 1
that code puts channels out in another order than it takes them in, which is a permutation of W_o's rows.
"""

import dataclasses
import math
from typing import Annotated, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from seqmodels.errors import UserError
from seqmodels.layers import NoWeightDecay, Weight, dense, normal_init
from seqmodels.ops import hippo
from seqmodels.ops.causal_conv import causal_conv
from seqmodels.ops.diagonal_ssm import RULES, diagonal_ssm, discretise
from seqmodels.ops.dispatch import Implementation
from seqmodels.ranges import AtLeast, Checked, MultipleOf, OneOf, Positive, Size, StateSize, Taps


@dataclasses.dataclass(frozen=True)
class Config(Checked, where="model.mixers.h3"):
    has_short_conv: ClassVar[bool] = True  # the shift SSM

    head_dim: Size = 1  # P, width of a head; the paper has 1 in its language models, 8 in its scaled-up ones
    state_size: Annotated[StateSize, MultipleOf(2)] = 64  # N, real numbers per input of the diagonal SSM: N/2 conjugate pairs
    shift_size: Taps = 64  # W, steps the shift SSM sees, and its state
    init: Annotated[str, OneOf(hippo.MODES)] = "lin"  # of the diagonal SSM's A: lin, inv, real or legs
    discretisation: Annotated[str, OneOf(RULES)] = "bilinear"  # of the diagonal SSM: bilinear or zoh
    dt_min: Positive = 1e-3  # step sizes start log-uniform between dt_min
    dt_max: Annotated[Positive, AtLeast("dt_min")] = 1e-1  # and dt_max: a head first sees about 1/dt steps
    implementation: Implementation | None = None  # of diagonal_ssm; None: the fastest for length and reset
    chunk_size: Size | None = None  # steps per chunk of the chunked form; None: the fastest

    @classmethod
    def paper(cls) -> "Config":
        """The published sizes (N = W = 64, P = 1, arXiv 2212.14052, appendix C), which are the defaults."""
        return cls()


class State(NamedTuple):
    keys: Float[Array, "B tail D"]  # the last W - 1
    memory: Float[Array, "B D P N"]  # of the diagonal SSM for the products of each key channel: real, then imaginary


class Mixer(nnx.Module):
    """H3 behind the interface of a mixer."""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        self.config = config
        self.d_model = d_model
        self.num_heads, odd = divmod(d_model, config.head_dim)
        if odd:
            raise UserError(f"model.mixers.h3.head_dim={config.head_dim} must divide model.d_model={d_model}")
        for name in ("query", "key", "value", "output"):
            setattr(self, f"{name}_kernel", Weight(normal_init(rngs.params(), (d_model, d_model))))
            setattr(self, f"{name}_bias", nnx.Param(jnp.zeros((d_model,), jnp.float32)))
        W, modes = config.shift_size, config.state_size // 2
        # The shift SSM starts with B = e_1, so that C is its kernel; C is torch's Kaiming over all of it.
        self.shift_B = NoWeightDecay(jnp.zeros((d_model, W), jnp.float32).at[:, 0].set(1.0))
        bound = (d_model * W) ** -0.5
        self.shift_C = NoWeightDecay(jax.random.uniform(rngs.params(), (d_model, W), jnp.float32, -bound, bound))
        self.shift_D = nnx.Param(jax.random.normal(rngs.params(), (d_model,), jnp.float32))
        bounds = math.log(config.dt_min), math.log(config.dt_max)
        self.log_dt = nnx.Param(jax.random.uniform(rngs.params(), (self.num_heads,), jnp.float32, *bounds))
        A = hippo.diagonal_modes(config.init, modes)
        self.A_log, self.A_imag = self._per_head(np.log(-A.real)), self._per_head(A.imag)
        self.B_real, self.B_imag = self._per_head(np.ones(modes)), self._per_head(np.zeros(modes))
        self.C_real = NoWeightDecay(normal_init(rngs.params(), (self.num_heads, modes), 0.5**0.5))
        self.C_imag = NoWeightDecay(normal_init(rngs.params(), (self.num_heads, modes), 0.5**0.5))
        self.D = nnx.Param(jax.random.normal(rngs.params(), (self.num_heads,), jnp.float32))

    def _per_head(self, values: Float[np.ndarray, " M"]) -> nnx.Param:
        return NoWeightDecay(jnp.asarray(np.tile(values, (self.num_heads, 1)), jnp.float32))

    def init_state(self, batch_size: int, max_len: int) -> State:
        """Zeros; the size does not depend on ``max_len``."""
        config = self.config
        keys = jnp.zeros((batch_size, config.shift_size - 1, self.d_model), jnp.float32)
        memory = jnp.zeros((batch_size, self.d_model, config.head_dim, config.state_size), jnp.float32)
        return State(keys, memory)

    def shift_weight(self) -> Float[Array, "W D"]:
        """The shift SSM and its skip as a convolution's weight, oldest step first."""
        W = self.config.shift_size
        # row l of the matrix is C moved up by l
        later = np.arange(W)[:, None] + np.arange(W)
        moved = jnp.pad(self.shift_C[...], ((0, 0), (0, W)))[:, later]
        kernel = jnp.einsum("dn,dln->ld", self.shift_B[...], moved, precision=lax.Precision.HIGHEST)
        return kernel.at[0].add(self.shift_D[...])[::-1]

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, *, reset: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        """Mixes T steps that follow those of ``state``; ``reset`` marks the steps at which a new document starts."""
        keys, memory = (None, None) if state is None else state
        q, k, v = (
            dense(x, kernel[...]) + bias[...].astype(x.dtype)
            for kernel, bias in (
                (self.query_kernel, self.query_bias),
                (self.key_kernel, self.key_bias),
                (self.value_kernel, self.value_bias),
            )
        )
        k, keys = causal_conv(k.astype(jnp.float32), self.shift_weight(), state=keys, reset=reset)
        o, memory = self.remember(q.astype(jnp.float32), k, v.astype(jnp.float32), memory, reset)
        y = dense(o.astype(x.dtype), self.output_kernel[...]) + self.output_bias[...].astype(x.dtype)
        return y, State(keys, memory)

    def remember(
        self,
        q: Float[Array, "B T D"],
        k: Float[Array, "B T D"],
        v: Float[Array, "B T D"],
        memory: Float[Array, "B D P N"] | None,
        reset: Bool[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B D P N"]]:
        """q_t^T s_t of all heads, and the diagonal SSM's state. Its P x P inputs per head are rows of a batch."""
        (batch, T, _), H, P, N = q.shape, self.num_heads, self.config.head_dim, self.config.state_size
        A = lax.complex(-jnp.exp(self.A_log[...]), self.A_imag[...])
        B, C = lax.complex(self.B_real[...], self.B_imag[...]), lax.complex(self.C_real[...], self.C_imag[...])
        dA_minus_1, dB = discretise(A, B, jnp.exp(self.log_dt[...]), self.config.discretisation)
        q, k, v = (each.reshape(batch, T, H, P) for each in (q, k, v))
        products = jnp.einsum("bthp,bthr->bprth", k, v)
        if memory is not None:
            memory = jnp.moveaxis(memory.reshape(batch, H, P, P, N), 1, 3).reshape(batch * P * P, H, N)
        s, memory = diagonal_ssm(
            products.reshape(batch * P * P, T, H),
            dA_minus_1,
            dB,
            C,
            state=memory,
            reset=None if reset is None else jnp.repeat(reset, P * P, axis=0),
            implementation=self.config.implementation,
            chunk_size=self.config.chunk_size,
        )
        s = s.reshape(products.shape) + self.D[...] * products
        memory = jnp.moveaxis(memory.reshape(batch, P, P, H, N), 3, 1).reshape(batch, H * P, P, N)
        o = jnp.einsum("bthp,bprth->bthr", q, s, precision=lax.Precision.HIGHEST)
        return o.reshape(batch, T, H * P), memory
