"""mLSTM, the matrix memory of xLSTM: linear attention whose tokens open an exponential input gate and a forget gate.

    m_t = max(log f_t + m_{t-1}, i_t)          log f_t = log_sigmoid(a_t W_f + b_f), i_t = a_t W_i + b_i: one per head
    C_t = exp(log f_t + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) k_t v_t^T            and n_t likewise of k_t alone
    h_t = K^-1/2 q_t^T C_t / (max(|K^-1/2 q_t . n_t|, exp(-m_t)) + eps)              in every head

"xLSTM: extended long short-term memory", arXiv 2405.04517, eq. 15-17 and 19-27. Two blocks are built around this cell:

``block="v1"``, the paper's own, projects up before the cell and stands alone, without an MLP:

    u_t, z_t = x_t W_u, x_t W_z                                                      width E = expansion D
    c_t = silu(conv(u)_t)                                                            causal, depthwise, 4 taps
    q_t, k_t, v_t = c_t W_q, c_t W_k, u_t W_v                                        block-diagonal, blocks of 4 x 4
    a_t = [q_t, k_t, v_t]
    y_t = ((LayerNorm(h_t) + skip * c_t) * silu(z_t)) W_o                            LayerNorm in every head

``block="v2"``, of its authors' 7B model (arXiv 2503.13427), has the shape of the other mixers here; an MLP follows it:

    q_t, k_t, v_t = x_t W_q, x_t W_k, x_t W_v                                        widths D/2, D/2, D
    a_t = x_t, and both logits are capped softly: 15 tanh(logit / 15)
    y_t = (LayerNorm(h_t) * sigmoid(x_t W_z)) W_o                                    LayerNorm in every head

Table 1 of arXiv 2312.06635: G_t = γ_t 1ᵀ1, γ_t = σ(x_t W_γ)

State: K V + K + 1 numbers per head in float32; in v1 also the convolution's last 3 inputs, E numbers each.

Numerical trap: the gates' logits are exponents. They are computed in float32, from bfloat16 activations too, and are
exponentiated only relative to m (``mlstm_cell`` says how h and the gradients stay exact).

Parameters: 6 D^2 + (38 + 12 H) D + 2 H for v1, 4 D^2 + (2 H + 1) D + 2 H for v2, with the default expansions.

Deviations from the paper: q is scaled where the paper scales k, which is the same h. The output projection starts at
1/sqrt(E), scaled with the depth by the model, instead of 2/(layers sqrt(D)). The model around v1 has RMSNorm, not
LayerNorm; the one around v2 caps its logits with ``model.logit_cap=30``, which is not the default.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from seqmodels.errors import UserError
from seqmodels.layers import NoWeightDecay, Weight, dense, head_widths, matmul_precision, normal_init
from seqmodels.ops.causal_conv import causal_conv
from seqmodels.ops.dispatch import Implementation
from seqmodels.ops.mlstm_cell import MLSTMState, empty_mlstm_state, mlstm_cell
from seqmodels.ops.placement import per_shard
from seqmodels.ranges import Checked, Epsilon, Expansion, OneOf, Positive, Size, Taps

PATTERN = "mlstm mlstm"  # the block: the default one has its MLP's parameters inside
BLOCKS = ("v1", "v2")
FORGET_BIAS = (3.0, 6.0)  # first and last head's: memories of 20 to 400 steps
INPUT_BIAS_DEVIATION = 0.1


@dataclasses.dataclass(frozen=True)
class Config(Checked, where="model.mixers.mlstm"):
    # v1: the paper's, instead of a mixer and an MLP; v2: the 7B model's, followed by an MLP
    block: Annotated[str, OneOf(BLOCKS)] = "v1"
    num_heads: Size = 4  # H; divides the widths of keys and values
    expansion: Expansion = 2.0  # v1: E = expansion d_model, which is H K = H V
    width_multiple: Size = 64  # v1: E is rounded up to a multiple of this, which num_heads and projection_block divide
    projection_block: Size = 4  # v1: q, k and v mix so many neighbouring channels
    conv_width: Taps = 4  # v1: W, taps of the convolution, the current step among them
    key_expansion: Expansion = 0.5  # v2: H K = key_expansion d_model
    value_expansion: Expansion = 1.0  # v2: H V = value_expansion d_model
    gate_cap: Positive = 15.0  # v2: gates' logits stay within +-gate_cap
    input_bias: float = 0.0  # mean of the input gates' initial biases; the 7B model has -10
    norm_eps: Epsilon = 1e-5  # of the heads' LayerNorm
    implementation: Implementation | None = None  # of mlstm_cell; None: the fastest for device and shape
    chunk_size: Size | None = None  # steps per chunk of the chunked form; None: the fastest for the device

    @property
    def has_short_conv(self) -> bool:
        """v1 convolves queries' and keys' inputs, v2 nothing."""
        return self.block == "v1" and self.conv_width > 1

    @classmethod
    def paper(cls) -> "Config":
        """The published block (4 heads, twice the width inside, blocks and convolution of 4), which is the default."""
        return cls()

    @classmethod
    def xlstm_7b(cls) -> "Config":
        """The block of xLSTM 7B (arXiv 2503.13427): 8 heads at width 4096, input gates that start shut."""
        return cls(block="v2", num_heads=8, input_bias=-10.0, norm_eps=1e-6)


class State(NamedTuple):
    cell: MLSTMState
    conv_tail: Float[Array, "B tail E"] | None  # the convolution's last inputs, oldest first; v2 has none


class Mixer(nnx.Module):
    """mLSTM behind the interface of a mixer."""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        self.config = config
        if config.block == "v1":
            multiple = config.width_multiple
            key_dim = value_dim = -(-int(config.expansion * d_model) // multiple) * multiple
        else:
            key_dim, value_dim = int(config.key_expansion * d_model), int(config.value_expansion * d_model)
        self.key_head_dim, self.value_head_dim = head_widths(config, d_model, keys=key_dim, values=value_dim)
        # Nguyen and Salazar 2019, as in the authors' code, for everything but the last projection.
        small = (2 / (5 * d_model)) ** 0.5

        def projection(*shape):
            return Weight(normal_init(rngs.params(), shape, small))

        if config.block == "v1":
            blocks, odd = divmod(value_dim, config.projection_block)
            if odd:
                raise UserError(
                    f"model.mixers.mlstm.projection_block={config.projection_block} must divide the inner width "
                    f"{value_dim}: change it, or set width_multiple to a multiple of it"
                )
            self.up_kernel = projection(d_model, value_dim)
            bound = config.conv_width**-0.5
            conv = (config.conv_width, value_dim)
            self.conv_kernel = Weight(jax.random.uniform(rngs.params(), conv, jnp.float32, -bound, bound))
            self.conv_bias = nnx.Param(jax.random.uniform(rngs.params(), conv[1:], jnp.float32, -bound, bound))
            square = (blocks, config.projection_block, config.projection_block)
            self.query_kernel, self.key_kernel, self.value_kernel = (projection(*square) for _ in range(3))
            self.skip_scale = nnx.Param(jnp.ones((value_dim,), jnp.float32))
            gate_inputs = 3 * value_dim
        else:
            self.query_kernel = projection(d_model, key_dim)
            self.key_kernel = projection(d_model, key_dim)
            self.value_kernel = projection(d_model, value_dim)
            gate_inputs = d_model
        H = config.num_heads
        self.input_gate_logit_kernel = NoWeightDecay(jnp.zeros((gate_inputs, H), jnp.float32))
        self.input_gate_logit_bias = nnx.Param(config.input_bias + normal_init(rngs.params(), (H,), INPUT_BIAS_DEVIATION))
        self.forget_gate_logit_kernel = NoWeightDecay(jnp.zeros((gate_inputs, H), jnp.float32))
        self.forget_gate_logit_bias = nnx.Param(jnp.linspace(*FORGET_BIAS, H, dtype=jnp.float32))
        self.head_norm_scale = nnx.Param(jnp.ones((value_dim,), jnp.float32))
        self.gate_kernel = projection(d_model, value_dim)
        self.output_kernel = Weight(normal_init(rngs.params(), (value_dim, d_model)))

    def init_state(self, batch_size: int, max_len: int) -> State:
        """Zeros; the size does not depend on ``max_len``."""
        H, K, V = self.config.num_heads, self.key_head_dim, self.value_head_dim
        cell = empty_mlstm_state(batch_size, H, K, V)
        if self.config.block == "v2":
            return State(cell, None)
        return State(cell, jnp.zeros((batch_size, self.config.conv_width - 1, H * V), jnp.float32))

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, *, reset: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        """Mixes T steps that follow those of ``state``; ``reset`` marks the steps at which a new document starts."""
        cell, tail = (None, None) if state is None else state
        gate = dense(x, self.gate_kernel[...])
        if self.config.block == "v2":
            q, k, v = (dense(x, kernel[...]) for kernel in (self.query_kernel, self.key_kernel, self.value_kernel))
            h, cell = self._remember(q, k, v, self._gate_logits(x), cell, reset)
            y = h * jax.nn.sigmoid(gate)
        else:
            u = dense(x, self.up_kernel[...])
            c, tail = causal_conv(u, self.conv_kernel[...], self.conv_bias[...], state=tail, reset=reset)
            c = jax.nn.silu(c)
            q, k, v = (
                block_diagonal(of, kernel[...])
                for of, kernel in ((c, self.query_kernel), (c, self.key_kernel), (u, self.value_kernel))
            )
            logits = self._gate_logits(jnp.concatenate([q, k, v], axis=-1))
            h, cell = self._remember(q, k, v, logits, cell, reset)
            y = (h + self.skip_scale[...].astype(x.dtype) * c) * jax.nn.silu(gate)
        return dense(y, self.output_kernel[...]), State(cell, tail)

    def _gate_logits(self, a: Float[Array, "B T X"]) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
        """Of input and forget gate, float32: exponents do not survive a rounding to bfloat16."""
        kernel = jnp.concatenate([self.input_gate_logit_kernel[...], self.forget_gate_logit_kernel[...]], axis=1)
        bias = jnp.concatenate([self.input_gate_logit_bias[...], self.forget_gate_logit_bias[...]])
        logits = dense(a.astype(jnp.float32), kernel) + bias
        if self.config.block == "v2":
            logits = self.config.gate_cap * jnp.tanh(logits / self.config.gate_cap)
        return logits[..., : self.config.num_heads], logits[..., self.config.num_heads :]

    def _remember(self, q, k, v, gate_logits, cell, reset) -> tuple[Float[Array, "B T X"], MLSTMState]:
        """The cell, and the LayerNorm of its output in every head."""
        H = self.config.num_heads
        q, k, v = (x.reshape(*x.shape[:2], H, x.shape[2] // H) for x in (q, k, v))
        h, cell = mlstm_cell(
            q * self.key_head_dim**-0.5,
            k,
            v,
            *gate_logits,
            state=cell,
            reset=reset,
            implementation=self.config.implementation,
            chunk_size=self.config.chunk_size,
        )
        wide = h.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.config.norm_eps)
        return (wide.reshape(*h.shape[:2], H * h.shape[3]) * self.head_norm_scale[...]).astype(h.dtype), cell


def block_diagonal(x: Float[Array, "B T E"], kernel: Float[Array, "n i o"]) -> Float[Array, "B T E"]:
    """``x`` times the matrix with the n blocks of ``kernel`` on its diagonal, in the dtype of ``x``."""
    n, i, o = kernel.shape
    return _times_blocks(x.reshape(*x.shape[:-1], n, i), kernel.astype(x.dtype)).reshape(*x.shape[:-1], n * o)


@per_shard({"x": "b t h", "kernel": "h"}, results="b t h")
def _times_blocks(x: Float[Array, "B T n i"], kernel: Float[Array, "n i o"]) -> Float[Array, "B T n o"]:
    """Each device multiplies by its own blocks. XLA of JAX 0.10.2 partitions the gradient of this product wrongly.

    Blocks come first in the product: as "btni,nio->btno" its gradient took a CPU 2.5 times as long.
    """
    rows = x.reshape(-1, *x.shape[2:]).swapaxes(0, 1)
    y = jnp.einsum("nri,nio->nro", rows, kernel, precision=matmul_precision(x.dtype))
    return y.swapaxes(0, 1).reshape(*x.shape[:-1], kernel.shape[2])
