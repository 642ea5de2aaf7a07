"""S4D, and S4: every channel runs a linear time-invariant state space model, which is a convolution with a long kernel.

    A = -exp(A_log) + i A_imag,  dt = exp(log_dt)                                    M = N/2 complex modes per channel
    dA, dB = discretise(A, 1, dt)
    h_t = dA * h_{t-1} + dB x_t,   s_t = 2 Re(sum over modes of C h_t) + D x_t
    a_t = gelu(s_t),   y_t = (a_t W_o + b_o) * sigmoid(a_t W_g + b_g)

"On the parameterization and initialization of diagonal state space models", arXiv 2206.11893, section 3 and 4; the block
is the authors' s4d.py. With ``structure="dplr"``, S4: the state matrix is diag(A) - P P^*, bilinear, all of A, P, B and C
learned ("Efficiently modeling long sequences with structured state spaces", arXiv 2111.00396, section 3).

State: N numbers per channel in float32, the real parts of the modes, then the imaginary parts.

Numerical trap: slow modes have dA = 1 - 0.0005, of which float32 keeps three digits too few, and phases reach thousands of
radians; the op carries dA - 1 and its powers instead. (e^z - 1) / A is made from expm1.

Parameters: 2 D^2 + 2 N D + 4 D, with S4's P and B 4 N D. State space parameters get no weight decay.

Deviations from the paper: the authors' recipe gives A and dt a smaller learning rate (1e-3), here all have one. Their S4 code
clips the imaginary part of B to +-2 at initialisation; here B is HiPPO-LegS's own. Projections start as in the other mixers.
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Complex, Float

from seqmodels.errors import UserError
from seqmodels.layers import NoWeightDecay, Weight, dense, normal_init
from seqmodels.ops import hippo
from seqmodels.ops.diagonal_ssm import RULES, diagonal_ssm, discretise
from seqmodels.ops.dispatch import Implementation
from seqmodels.ops.dplr_ssm import dplr_ssm
from seqmodels.ranges import AtLeast, Checked, MultipleOf, OneOf, Positive, Size, StateSize

STRUCTURES = ("diagonal", "dplr")


@dataclasses.dataclass(frozen=True)
class Config(Checked, where="model.mixers.s4d"):
    state_size: Annotated[StateSize, MultipleOf(2)] = 64  # N, real numbers per channel: N/2 conjugate pairs
    # of the state matrix: diagonal (S4D), or dplr (S4: diagonal plus low rank)
    structure: Annotated[str, OneOf(STRUCTURES)] = "diagonal"
    init: Annotated[str, OneOf(hippo.MODES)] = "legs"  # of A: lin, inv, real or legs (S4 has legs alone)
    discretisation: Annotated[str, OneOf(RULES)] = "zoh"  # zoh, or bilinear (S4 has bilinear alone)
    dt_min: Positive = 1e-3  # step sizes start log-uniform between dt_min
    dt_max: Annotated[Positive, AtLeast("dt_min")] = 1e-1  # and dt_max: a channel first sees about 1/dt steps
    implementation: Implementation | None = None  # of diagonal_ssm or dplr_ssm; None: the fastest for length and reset
    chunk_size: Size | None = None  # steps per chunk of the chunked form; None: the fastest

    def __post_init__(self):
        super().__post_init__()
        if self.structure == "dplr":
            for field, only in (("init", "legs"), ("discretisation", "bilinear")):
                if getattr(self, field) != only:
                    raise UserError(
                        f"{self.where}.{field}={getattr(self, field)!r} does not go with structure=dplr: set {field}={only}"
                    )

    @classmethod
    def paper(cls) -> "Config":
        """S4D-LegS as published (N = 64, arXiv 2206.11893, section 5), which are the defaults."""
        return cls()

    @classmethod
    def s4(cls) -> "Config":
        """S4 as published (N = 64, arXiv 2111.00396)."""
        return cls(structure="dplr", discretisation="bilinear")


State = Float[Array, "B D N"]
"""h: real parts, then imaginary parts."""


class Mixer(nnx.Module):
    """S4D (or S4) behind the interface of a mixer."""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        self.config = config
        self.d_model = d_model
        modes = config.state_size // 2
        bounds = math.log(config.dt_min), math.log(config.dt_max)
        self.log_dt = nnx.Param(jax.random.uniform(rngs.params(), (d_model,), jnp.float32, *bounds))
        if config.structure == "dplr":
            A, P, B = hippo.normal_plus_low_rank_legs(config.state_size)
            self.P_real, self.P_imag = self._per_channel(P.real), self._per_channel(P.imag)
            self.B_real, self.B_imag = self._per_channel(B.real), self._per_channel(B.imag)
        else:
            A = hippo.diagonal_modes(config.init, modes)
        self.A_log, self.A_imag = self._per_channel(np.log(-A.real)), self._per_channel(A.imag)
        self.C_real = NoWeightDecay(normal_init(rngs.params(), (d_model, modes), 0.5**0.5))
        self.C_imag = NoWeightDecay(normal_init(rngs.params(), (d_model, modes), 0.5**0.5))
        self.D = nnx.Param(jax.random.normal(rngs.params(), (d_model,), jnp.float32))
        self.output_kernel = Weight(normal_init(rngs.params(), (d_model, d_model)))
        self.output_bias = nnx.Param(jnp.zeros((d_model,), jnp.float32))
        self.gate_kernel = Weight(normal_init(rngs.params(), (d_model, d_model)))
        self.gate_bias = nnx.Param(jnp.zeros((d_model,), jnp.float32))

    def _per_channel(self, values: Float[np.ndarray, " M"]) -> nnx.Param:
        return NoWeightDecay(jnp.asarray(np.tile(values, (self.d_model, 1)), jnp.float32))

    def init_state(self, batch_size: int, max_len: int) -> State:
        """Zeros; the size does not depend on ``max_len``."""
        return jnp.zeros((batch_size, self.d_model, self.config.state_size), jnp.float32)

    def A(self) -> Complex[Array, "D M"]:
        """The diagonal of every channel's state matrix."""
        return lax.complex(-jnp.exp(self.A_log[...]), self.A_imag[...])

    def ssm(
        self, x: Float[Array, "B T D"], state: State | None, reset: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T D"], State]:
        """Outputs of the state space models without their skip, in the dtype of ``x``, and the state."""
        config = self.config
        A, dt = self.A(), jnp.exp(self.log_dt[...])
        C = lax.complex(self.C_real[...], self.C_imag[...])
        options = {"implementation": config.implementation, "chunk_size": config.chunk_size}
        if config.structure == "dplr":
            P, B = lax.complex(self.P_real[...], self.P_imag[...]), lax.complex(self.B_real[...], self.B_imag[...])
            return dplr_ssm(x, A, P, B, C, dt, state=state, reset=reset, **options)
        dA_minus_1, dB = discretise(A, jnp.ones_like(A), dt, config.discretisation)
        return diagonal_ssm(x, dA_minus_1, dB, C, state=state, reset=reset, **options)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, *, reset: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        """Mixes T steps that follow those of ``state``; ``reset`` marks the steps at which a new document starts."""
        wide = x.astype(jnp.float32)
        s, state = self.ssm(wide, state, reset)
        a = jax.nn.gelu(s + self.D[...] * wide, approximate=False).astype(x.dtype)
        value = dense(a, self.output_kernel[...]) + self.output_bias[...].astype(x.dtype)
        gate = dense(a, self.gate_kernel[...]) + self.gate_bias[...].astype(x.dtype)
        return value * jax.nn.sigmoid(gate), state
