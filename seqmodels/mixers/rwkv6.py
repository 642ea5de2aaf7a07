"""RWKV-6 ("Finch"), the time mix: linear attention whose every key channel fades at a rate read from the token, and
whose every projection reads its own blend of the token and the one before it.

    xx_t = x_{t-1} - x_t                                                             x_0 = 0
    m_t = tanh((x_t + xx_t * mu_x) A) B                                              five blends, low rank
    x^i_t = x_t + xx_t * (mu_i + m^i_t)                                              i = w, k, v, r, g
    r_t, k_t, v_t, g_t = x^r_t W_r, x^k_t W_k, x^v_t W_v, silu(x^g_t W_g)            split into heads
    w_t = w_0 + tanh(x^w_t A_w) B_w                                                  low rank
    o_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T)                                        the bonus u for the token itself
    S_t = diag(exp(-exp(w_t))) S_{t-1} + k_t v_t^T
    y_t = (g_t * concat(LayerNorm(o_t))) W_o                                         normalised in every head

"Eagle and Finch", arXiv 2404.05892, section 4 (Finch); the sizes, the norm and the initialisation are those of its
authors' code (BlinkDL/RWKV-LM, RWKV_Tmix_x060). Their channel mix is the channel layer ``rwkv_channel_mix``.

Table 1 of arXiv 2312.06635: G_t = α_tᵀ 1, α_t = exp(-exp(x_t W_α))

State: K V numbers per head and the last input (D numbers), in float32.

Numerical trap: the log decay is -exp(w_t), in float32: a decay of e^-1000 is normal, and the op multiplies by
decays only. exp(w_t) itself overflows above 88, and its gradient there would be inf * 0: ``DECAY_CEILING``.

Parameters: with the default key_expansion 4 D^2 + (10 mix_rank + 1.5 decay_rank + 9) D, u among them; the paper has
5 D^2, and ranks of 32 and 64, which would add 3.5 D^2 at D = 128: hence the smaller defaults.

Deviations from the paper: keys half as wide by default, as in flash-linear-attention. The projections start normal
with deviation 1/sqrt(fan in) and W_o is scaled by depth, as everywhere in this project, where the authors have
orthogonal matrices, zero for W_o, and a norm that starts at ((l + 1)/L)^0.7. The norm in front is the model's
RMSNorm, not LayerNorm, and the embedding has none of its own (``model.norm=layer``, ``model.embedding_norm=True`` give both).
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from seqmodels.errors import UserError
from seqmodels.layers import NoWeightDecay, Weight, dense, normal_init, rwkv_depth
from seqmodels.ops.dispatch import Implementation
from seqmodels.ops.gated_linear_attention import gated_linear_attention
from seqmodels.ops.token_shift import token_shift
from seqmodels.ranges import Checked, Epsilon, Expansion, Size

LOW_RANK_BOUND = 0.01  # B and B_w start uniform within it; A and A_w start at zero
# From w = 4.7 on, exp(-exp(w)) is zero in float32 and so is its gradient: cutting w here changes neither.
DECAY_CEILING = 80.0


@dataclasses.dataclass(frozen=True)
class Config(Checked, where="model.mixers.rwkv6"):
    has_short_conv: ClassVar[bool] = True  # the token shift

    num_heads: Size = 4  # H; divides the widths of keys and values
    key_expansion: Expansion = 0.5  # H K = key_expansion d_model; the paper has 1
    mix_rank: Size = 8  # width between A and B for each of the five blends; the paper has 32
    decay_rank: Size = 16  # width between A_w and B_w; the paper has 64
    norm_eps: Epsilon = 64e-5  # of the heads' LayerNorm
    implementation: Implementation | None = None  # of gated_linear_attention; None: the fastest for device and shape
    chunk_size: Size | None = None  # steps per chunk of the chunked form; None: the fastest for the device

    @classmethod
    def paper(cls, d_model: int) -> "Config":
        """The published sizes: K = V = 64, ranks 32 and 64 (twice that from d_model 4096); a multiple of 64."""
        ranks = 2 if d_model >= 4096 else 1
        return cls(num_heads=d_model // 64, key_expansion=1.0, mix_rank=32 * ranks, decay_rank=64 * ranks)


class State(NamedTuple):
    memory: Float[Array, "B H K V"]  # S
    last: Float[Array, "B D"]  # x of the last step


class Mixer(nnx.Module):
    """RWKV-6's time mix behind the interface of a mixer.

    Args:
      layer_index: of this layer among the model's residual layers, mixers and channel layers alike, from 0.
      num_layers: how many of those there are. Both decide the initial blends, decays and bonus alone.
    """

    def __init__(
        self,
        config: Config,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        layer_index: int | Int[Array, ""] = 0,
        num_layers: int = 1,
    ):
        key_dim = int(config.key_expansion * d_model)
        self.config = config
        self.d_model = d_model
        self.key_head_dim, odd_keys = divmod(key_dim, config.num_heads)
        self.value_head_dim, odd_values = divmod(d_model, config.num_heads)
        if odd_keys or odd_values or not key_dim:
            raise UserError(
                f"model.mixers.rwkv6.num_heads={config.num_heads} must divide the widths of keys ({key_dim}, which is "
                f"model.d_model={d_model} times key_expansion) and values (model.d_model={d_model})"
            )
        depth = rwkv_depth(layer_index, num_layers)
        growing = (jnp.arange(d_model, dtype=jnp.float32) / d_model) ** depth.remaining
        slowly = (jnp.arange(d_model, dtype=jnp.float32) / d_model) ** (0.5 * depth.remaining)
        self.shift_mix = nnx.Param(1.0 - growing)
        self.mix = NoWeightDecay(1.0 - jnp.stack([growing, growing, growing + 0.3 * depth.reached, slowly, slowly]))
        # Named so that weight decay leaves them alone: pulled to zero, the blends would lose touch with the token.
        self.mix_in = NoWeightDecay(jnp.zeros((d_model, 5 * config.mix_rank), jnp.float32))
        self.mix_out = NoWeightDecay(_low_rank_init(rngs.params(), (5, config.mix_rank, d_model)))
        along = jnp.arange(key_dim, dtype=jnp.float32) / max(key_dim - 1, 1)
        self.decay_bias = nnx.Param(-6.0 + 5.0 * along ** (0.7 + 1.3 * depth.reached))
        self.decay_in_kernel = NoWeightDecay(jnp.zeros((d_model, config.decay_rank), jnp.float32))
        self.decay_out_kernel = NoWeightDecay(_low_rank_init(rngs.params(), (config.decay_rank, key_dim)))
        zigzag = 0.1 * (jnp.arange(1, key_dim + 1) % 3 - 1).astype(jnp.float32)
        bonus = depth.reached * (1.0 - along) + zigzag
        self.bonus = NoWeightDecay(bonus.reshape(config.num_heads, self.key_head_dim))
        self.receptance_kernel = Weight(normal_init(rngs.params(), (d_model, key_dim)))
        self.key_kernel = Weight(normal_init(rngs.params(), (d_model, key_dim)))
        self.value_kernel = Weight(normal_init(rngs.params(), (d_model, d_model)))
        self.gate_kernel = Weight(normal_init(rngs.params(), (d_model, d_model)))
        self.head_scale = NoWeightDecay(jnp.ones((config.num_heads, self.value_head_dim), jnp.float32))
        self.head_bias = NoWeightDecay(jnp.zeros((config.num_heads, self.value_head_dim), jnp.float32))
        self.output_kernel = Weight(normal_init(rngs.params(), (d_model, d_model)))

    def init_state(self, batch_size: int, max_len: int) -> State:
        """Zeros; the size does not depend on ``max_len``."""
        memory = (batch_size, self.config.num_heads, self.key_head_dim, self.value_head_dim)
        return State(jnp.zeros(memory, jnp.float32), jnp.zeros((batch_size, self.d_model), jnp.float32))

    def blends(self, x: Float[Array, "B T D"], shifted: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], ...]:
        """x^i_t for i = w, k, v, r, g."""
        xx = shifted - x
        low = jnp.tanh(dense(x + xx * self.shift_mix[...].astype(x.dtype), self.mix_in[...]))
        # Five products: as one einsum over i they take twelve times the CPU time (B 16, T 256, D 128: 100 ms against 8).
        return tuple(
            x + xx * (mu.astype(x.dtype) + dense(low, mix_out))
            for mu, low, mix_out in zip(self.mix[...], jnp.split(low, 5, axis=-1), self.mix_out[...])
        )

    def log_decay(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H K"]:
        """-exp(w_t) of every key channel, from x^w; float32."""
        low = dense(jnp.tanh(dense(x, self.decay_in_kernel[...])), self.decay_out_kernel[...])
        w = self.decay_bias[...] + low.astype(jnp.float32)
        log_decay = -jnp.exp(jnp.minimum(w, DECAY_CEILING))
        return log_decay.reshape(*x.shape[:2], self.config.num_heads, self.key_head_dim)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, *, reset: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        """Mixes T steps that follow those of ``state``; ``reset`` marks the steps at which a new document starts."""
        B, T, D = x.shape
        H, K, V = self.config.num_heads, self.key_head_dim, self.value_head_dim
        memory, last = (None, None) if state is None else state
        shifted, last = token_shift(x, state=last, reset=reset)
        x_w, x_k, x_v, x_r, x_g = self.blends(x, shifted)
        r = dense(x_r, self.receptance_kernel[...]).reshape(B, T, H, K)
        k = dense(x_k, self.key_kernel[...]).reshape(B, T, H, K)
        v = dense(x_v, self.value_kernel[...]).reshape(B, T, H, V)
        o, memory = gated_linear_attention(
            r,
            k,
            v,
            self.log_decay(x_w),
            bonus=self.bonus[...],
            state=memory,
            reset=reset,
            implementation=self.config.implementation,
            chunk_size=self.config.chunk_size,
        )
        y = jax.nn.silu(dense(x_g, self.gate_kernel[...])) * self._norm(o).reshape(B, T, D)
        return dense(y, self.output_kernel[...]), State(memory, last)

    def _norm(self, o: Float[Array, "B T H V"]) -> Float[Array, "B T H V"]:
        """LayerNorm of every head, with a scale and a bias of its own (GroupNorm with H groups), in float32."""
        wide = o.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.config.norm_eps)
        return (wide * self.head_scale[...] + self.head_bias[...]).astype(o.dtype)


def _low_rank_init(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    return jax.random.uniform(key, shape, jnp.float32, -LOW_RANK_BOUND, LOW_RANK_BOUND)
