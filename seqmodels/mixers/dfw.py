"""Decaying fast weights: a matrix memory that fades along its rows and along its columns, each at rates read from
the token.

    q_t, k_t, v_t = x_t W_q, x_t W_k, x_t W_v                                        split into heads
    alpha_t = sigmoid(x_t W_a + b_a)        beta_t = sigmoid(x_t W_b + b_b)          per key and per value channel
    S_t = (alpha_t beta_t^T) * S_{t-1} + k_t v_t^T
    o_t = q_t^T S_t                                                                  in every head
    y_t = concat(o_t) W_o

"Fine-tuning pre-trained transformers into decaying fast weights", arXiv 2210.04243 (its decay rule, as its authors'
T2FW computes it: no feature map, no scale, no normaliser); row DFW of Table 1 of arXiv 2312.06635.

Table 1 of arXiv 2312.06635: G_t = α_tᵀ β_t, α_t = σ(x_t W_α), β_t = σ(x_t W_β)

State: K V numbers per head in float32.

Numerical trap: the gates are never formed: their logarithms are log_sigmoid(.), in float32, and go to the op as two
decays. Folding beta into the values instead would divide by its running product, which underflows.

Parameters: 3 (key_expansion + value_expansion) D^2, 4.125 D^2 with the defaults, and a bias per gate.

Deviations from the paper: several heads, where the published kernel has one; the paper fine-tunes GPT-2, so how a network
starts from nothing is chosen here: queries and keys start small (Xavier, the gain of GLA and RetNet), for nothing divides by
their products, and the gates' biases (Table 1 omits biases) start at values with which S remembers for 10 to 200 steps. ``head_norm``
adds GLA's RMSNorm in every head, which the paper has not.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from seqmodels.layers import NoWeightDecay, RMSNorm, Weight, dense, head_widths, normal_init, xavier_uniform_init
from seqmodels.ops.dispatch import Implementation
from seqmodels.ops.gated_linear_attention import gated_linear_attention
from seqmodels.ranges import Checked, Epsilon, Expansion, Size

GAIN = 2**-2.5  # of the Xavier initialisation of queries, keys and gates
DECAY_BIASES = (3.0, 6.0)  # the gates' first and last bias within a head: sigmoid forgets 5 % to 0.25 % a step


@dataclasses.dataclass(frozen=True)
class Config(Checked, where="model.mixers.dfw"):
    num_heads: Size = 4  # H; divides the widths of keys and values; the paper has 1
    key_expansion: Expansion = 0.5  # H K = key_expansion d_model
    value_expansion: Expansion = 0.875  # H V = value_expansion d_model
    head_norm: bool = False  # RMSNorm with a learned scale on the output of every head
    norm_eps: Epsilon = 1e-5  # of that norm
    implementation: Implementation | None = None  # of gated_linear_attention; None: the fastest for device and shape
    chunk_size: Size | None = None  # steps per chunk of the chunked form; None: the fastest for the device

    @classmethod
    def paper(cls) -> "Config":
        """One head, keys and values as wide as the model: 6 D^2 parameters, D^2 numbers of state."""
        return cls(num_heads=1, key_expansion=1.0, value_expansion=1.0)


State = Float[Array, "B H K V"]
"""S."""


class Mixer(nnx.Module):
    """Decaying fast weights behind the interface of a mixer."""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        key_dim, value_dim = int(config.key_expansion * d_model), int(config.value_expansion * d_model)
        self.config = config
        self.key_head_dim, self.value_head_dim = head_widths(config, d_model, keys=key_dim, values=value_dim)

        def biases(width):
            return nnx.Param(jnp.tile(jnp.linspace(*DECAY_BIASES, width, dtype=jnp.float32), config.num_heads))

        self.query_kernel = Weight(xavier_uniform_init(rngs.params(), (d_model, key_dim), gain=GAIN))
        self.key_kernel = Weight(xavier_uniform_init(rngs.params(), (d_model, key_dim), gain=GAIN))
        self.value_kernel = Weight(normal_init(rngs.params(), (d_model, value_dim)))
        self.key_decay_kernel = NoWeightDecay(xavier_uniform_init(rngs.params(), (d_model, key_dim), gain=GAIN))
        self.key_decay_bias = biases(self.key_head_dim)
        self.value_decay_kernel = NoWeightDecay(xavier_uniform_init(rngs.params(), (d_model, value_dim), gain=GAIN))
        self.value_decay_bias = biases(self.value_head_dim)
        self.output_kernel = Weight(normal_init(rngs.params(), (value_dim, d_model)))
        if config.head_norm:
            self.head_norm = RMSNorm(self.value_head_dim, eps=config.norm_eps, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int) -> State:
        """Zeros; the size does not depend on ``max_len``."""
        shape = (batch_size, self.config.num_heads, self.key_head_dim, self.value_head_dim)
        return jnp.zeros(shape, jnp.float32)

    def log_decays(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H V"]]:
        """log(alpha_t) of every key channel and log(beta_t) of every value channel, float32."""

        def log_gate(kernel, bias):
            logit = dense(x, kernel).astype(jnp.float32) + bias
            H = self.config.num_heads
            return jax.nn.log_sigmoid(logit).reshape(*x.shape[:2], H, kernel.shape[1] // H)

        return (
            log_gate(self.key_decay_kernel[...], self.key_decay_bias[...]),
            log_gate(self.value_decay_kernel[...], self.value_decay_bias[...]),
        )

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, *, reset: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        """Mixes T steps that follow those of ``state``; ``reset`` marks the steps at which a new document starts."""
        B, T, _ = x.shape
        H, K, V = self.config.num_heads, self.key_head_dim, self.value_head_dim
        log_alpha, log_beta = self.log_decays(x)
        o, state = gated_linear_attention(
            dense(x, self.query_kernel[...]).reshape(B, T, H, K),
            dense(x, self.key_kernel[...]).reshape(B, T, H, K),
            dense(x, self.value_kernel[...]).reshape(B, T, H, V),
            log_alpha,
            value_log_decay=log_beta,
            state=state,
            reset=reset,
            implementation=self.config.implementation,
            chunk_size=self.config.chunk_size,
        )
        if self.config.head_norm:
            o = self.head_norm(o)
        return dense(o.reshape(B, T, H * V), self.output_kernel[...]), state
