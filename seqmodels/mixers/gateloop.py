"""GateLoop: a linear recurrence whose decay is a complex number read from the token, so that the memory fades and
turns.

    q_t, k_t, v_t = x_t W_q, x_t W_k, x_t W_v                                        split into heads
    S_t = diag(a_t) S_{t-1} + k_t v_t^T        o_t = Re(q_t^T S_t)                   S complex, in every head
    y_t = (silu(x_t W_g) * concat(o_t)) W_o

    gate="polar":      a_t = sigmoid(x_t W_a + b_a) exp(i (x_t W_p + b_p))           one per key channel
    gate="cartesian":  z_t = x_t W_a + b_a complex,  a_t = sigmoid(|z_t|) exp(i arg z_t)      one per head

"GateLoop: fully data-controlled linear recurrence for sequence modeling", arXiv 2311.01927. Polar is the paper's form as Table 1
of arXiv 2312.06635 has it; cartesian, the output gate and the absence of any scale or normaliser are those of
lucidrains' gateloop-transformer.

Table 1 of arXiv 2312.06635: G_t = α_tᵀ 1, α_t = σ(x_t W_α1) exp(i x_t W_α2)

State: K V complex numbers per head, as real and imaginary parts in float32.

Numerical trap: arg z has no derivative at z = 0, and one of size 1/|z| beside it. ``polar`` is differentiated by hand: exactly
from |z| = 1e-6 on, smaller within, zero at zero. And the angles of a text add up: their projection is float32, for a bfloat16
error would be the same error at every step.

One key and one value channel per head ("max heads", num_heads=d_model) make S one number per channel: then ``linear_recurrence``
runs on the complex numbers themselves. Scores between the steps of a chunk would cost chunk_size times its memory (temporaries of a
gradient, in units of x, at T 1024: 21 against 304 where chunks of 64 are prepared side by side; 7 times the CPU time).

Parameters: (4 key_expansion + 3 value_expansion) D^2, 4 D^2 with the defaults, and two biases per key channel; with a cartesian gate
(2 key_expansion + 3 value_expansion) D^2 + 2 H (D + 1).

Deviations from the paper: lucidrains' output gate. Initialisation of the polar gate is chosen here: queries, keys and gates start
small (Xavier, the gain of GLA and RetNet), moduli with biases that remember for 20 to 400 steps, angles near 0. Gradients
through the gate are not scaled down (lucidrains has 0.9). ``output_norm`` is lucidrains' sub_ln, but an RMSNorm.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from seqmodels.layers import NoWeightDecay, RMSNorm, Weight, dense, head_widths, normal_init, xavier_uniform_init
from seqmodels.ops.complex_decay import complex_gated_linear_attention
from seqmodels.ops.dispatch import Implementation
from seqmodels.ops.linear_recurrence import linear_recurrence
from seqmodels.ranges import Checked, Epsilon, Expansion, OneOf, Size

GATES = ("polar", "cartesian")
GAIN = 2**-2.5  # of the Xavier initialisation of queries, keys and a polar gate
DECAY_BIASES = (3.0, 6.0)  # smallest and largest bias of a polar gate's moduli: sigmoid forgets 5 % to 0.25 % a step
SINGULAR = 1e-6  # |z| below which the derivatives of |z| and arg z are damped


@dataclasses.dataclass(frozen=True)
class Config(Checked, where="model.mixers.gateloop"):
    num_heads: Size = 4  # H, from 1 to d_model; divides the widths of keys and values
    key_expansion: Expansion = 0.25  # H K = key_expansion d_model
    value_expansion: Expansion = 1.0  # H V = value_expansion d_model
    # polar (modulus and angle, per key channel) or cartesian (real and imaginary part, per head)
    gate: Annotated[str, OneOf(GATES)] = "polar"
    output_norm: bool = False  # RMSNorm with a learned scale over the outputs of all heads, before the output gate
    norm_eps: Epsilon = 1e-5  # of that norm
    implementation: Implementation | None = None  # of the op; None: the fastest for device and shape
    chunk_size: Size | None = None  # steps per chunk of the chunked form (unused with max heads); None: the fastest

    @classmethod
    def max_heads(cls, d_model: int, gate: str = "polar") -> "Config":
        """One complex number of state per channel of the model: 7 D^2 parameters with either gate."""
        return cls(num_heads=d_model, key_expansion=1.0, value_expansion=1.0, gate=gate)


State = Float[Array, "B H keys V"]
"""S: its real part in the first K rows, its imaginary part in the last K."""


@jax.custom_jvp
def polar(
    real: Float[Array, "*shape"], imaginary: Float[Array, "*shape"]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """|z| and arg z, with finite derivatives everywhere: 1/|z| is taken as |z| / SINGULAR^2 where |z| < SINGULAR."""
    return jnp.sqrt(jnp.square(real) + jnp.square(imaginary)), jnp.arctan2(imaginary, real)


@polar.defjvp
def _polar_derivative(primals, tangents):
    real, imaginary = primals
    d_real, d_imaginary = tangents
    modulus, angle = polar(real, imaginary)
    along, across = real * d_real + imaginary * d_imaginary, real * d_imaginary - imaginary * d_real
    reach = jnp.maximum(modulus, SINGULAR)
    return (modulus, angle), (along / reach, across / reach / reach)


class Mixer(nnx.Module):
    """GateLoop behind the interface of a mixer."""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        key_dim, value_dim = int(config.key_expansion * d_model), int(config.value_expansion * d_model)
        H = config.num_heads
        self.config = config
        self.key_head_dim, self.value_head_dim = head_widths(config, d_model, keys=key_dim, values=value_dim)
        self.query_kernel = Weight(xavier_uniform_init(rngs.params(), (d_model, key_dim), gain=GAIN))
        self.key_kernel = Weight(xavier_uniform_init(rngs.params(), (d_model, key_dim), gain=GAIN))
        self.value_kernel = Weight(normal_init(rngs.params(), (d_model, value_dim)))
        self.gate_kernel = Weight(normal_init(rngs.params(), (d_model, value_dim)))
        if config.gate == "polar":
            # Every head gets the whole range of memories; with one channel per head, the heads share it out.
            moduli = jnp.linspace(*DECAY_BIASES, key_dim, dtype=jnp.float32).reshape(self.key_head_dim, H)
            self.decay_kernel = NoWeightDecay(xavier_uniform_init(rngs.params(), (d_model, key_dim), gain=GAIN))
            self.decay_bias = nnx.Param(moduli.T.reshape(key_dim))
            self.decay_angle_kernel = NoWeightDecay(xavier_uniform_init(rngs.params(), (d_model, key_dim), gain=GAIN))
            self.decay_angle_bias = nnx.Param(jnp.zeros((key_dim,), jnp.float32))
        else:
            bound = d_model**-0.5  # torch's default, which lucidrains' layer has

            def uniform(*shape):
                return NoWeightDecay(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound))

            self.decay_kernel, self.decay_bias = uniform(d_model, 2 * H), uniform(2 * H)
        self.output_kernel = Weight(normal_init(rngs.params(), (value_dim, d_model)))
        if config.output_norm:
            self.output_norm = RMSNorm(value_dim, eps=config.norm_eps, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int) -> State:
        """Zeros; the size does not depend on ``max_len``."""
        shape = (batch_size, self.config.num_heads, 2 * self.key_head_dim, self.value_head_dim)
        return jnp.zeros(shape, jnp.float32)

    def decay(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T H X"], Float[Array, "B T H X"]]:
        """log |a_t| and arg a_t in float32; X is K for a polar gate, 1 for a cartesian one."""
        wide = x.astype(jnp.float32)
        H = self.config.num_heads
        heads = (*x.shape[:2], H, self.decay_kernel.shape[1] // H)
        first = (dense(wide, self.decay_kernel[...]) + self.decay_bias[...]).reshape(heads)
        if self.config.gate == "polar":
            angle = dense(wide, self.decay_angle_kernel[...]) + self.decay_angle_bias[...]
            return jax.nn.log_sigmoid(first), angle.reshape(heads)
        modulus, angle = polar(first[..., :1], first[..., 1:])
        return jax.nn.log_sigmoid(modulus), angle

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, *, reset: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        """Mixes T steps that follow those of ``state``; ``reset`` marks the steps at which a new document starts."""
        B, T, _ = x.shape
        H, K, V = self.config.num_heads, self.key_head_dim, self.value_head_dim
        # Queries and keys are turned by float32 angles, so they are float32 too.
        q = dense(x, self.query_kernel[...]).astype(jnp.float32).reshape(B, T, H, K)
        k = dense(x, self.key_kernel[...]).astype(jnp.float32).reshape(B, T, H, K)
        v = dense(x, self.value_kernel[...]).reshape(B, T, H, V)
        log_decay, angle = self.decay(x)
        # The quadratic form of one channel per head exists too: it is the other op's.
        if K == V == 1 and self.config.implementation != "parallel":
            o, state = self._elementwise(q, k, v, log_decay, angle, state, reset)
        else:
            o, state = complex_gated_linear_attention(
                q,
                k,
                v,
                log_decay,
                angle,
                state=state,
                reset=reset,
                implementation=self.config.implementation,
                chunk_size=self.config.chunk_size,
            )
        o = o.reshape(B, T, H * V)
        if self.config.output_norm:
            o = self.output_norm(o)
        return dense(jax.nn.silu(dense(x, self.gate_kernel[...])) * o, self.output_kernel[...]), state

    def _elementwise(self, q, k, v, log_decay, angle, state, reset):
        """The same recurrence with S one complex number per head."""
        decay = jnp.exp(log_decay)
        a = lax.complex(decay * jnp.cos(angle), decay * jnp.sin(angle))
        b = (k * v.astype(jnp.float32)).astype(jnp.complex64)
        if state is not None:
            state = lax.complex(state[:, :, 0], state[:, :, 1])
        S, state = linear_recurrence(a, b, state=state, reset=reset, implementation=self.config.implementation)
        return (q * S.real).astype(v.dtype), jnp.stack([state.real, state.imag], axis=2)
