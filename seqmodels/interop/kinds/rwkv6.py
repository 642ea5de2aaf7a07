"""RWKV-6, as flash-linear-attention saves it: LayerNorms with biases, one of them on the embedding.

Its blends are in the order r, w, k, v, g; ours w, k, v, r, g.
"""

import numpy as np

from seqmodels.interop import fla
from seqmodels.interop.table import FLAT, Field, Fixed, Kind, Layout, Tensor

OURS_IN_THEIRS = [1, 2, 3, 0, 4]  # where w, k, v, r, g are in r, w, k, v, g
THEIRS_IN_OURS = [3, 0, 1, 2, 4]


def mlp_hidden(width, theirs):
    """Where the config gives no width: hidden_ratio times the model's, up to a multiple of 32."""
    if width is not None:
        return width
    ratio = theirs["hidden_ratio"] if theirs.get("hidden_ratio") is not None else 3.5
    return -(-int(theirs["hidden_size"] * ratio) // 32) * 32


# mix [5, D] there and here
BLENDS = Layout(lambda theirs, shape: theirs[OURS_IN_THEIRS], lambda ours: ours[THEIRS_IN_OURS])
# mix_in: [5 rank, D] there, [D, 5 rank] here
BLENDS_IN = Layout(
    lambda theirs, shape: theirs.reshape(5, -1, theirs.shape[1])[OURS_IN_THEIRS].reshape(theirs.shape).T,
    lambda ours: ours.T.reshape(5, -1, ours.shape[0])[THEIRS_IN_OURS].reshape(ours.shape[::-1]),
)
# mix_out: [D, 5 rank] there, [5, rank, D] here
BLENDS_OUT = Layout(
    lambda theirs, shape: np.moveaxis(theirs.reshape(len(theirs), 5, -1), 0, 2)[OURS_IN_THEIRS],
    lambda ours: np.moveaxis(ours[THEIRS_IN_OURS], 2, 0).reshape(ours.shape[2], -1),
)

KIND = Kind(
    model_type="rwkv6",
    architecture="RWKV6ForCausalLM",
    library="flash-linear-attention",
    pattern="rwkv6 rwkv_channel_mix",
    fields=(
        *fla.OUTSIDE_FIELDS,
        Field("intermediate_size", "channel.hidden", default=None, read=mlp_hidden),
        Field("num_heads", "mixer.num_heads", default=4),
        Field("expand_k", "mixer.key_expansion", default=0.5),
        Field("proj_low_rank_dim", "mixer.mix_rank", default=32),
        Field("gate_low_rank_dim", "mixer.decay_rank", default=64),
        Field("norm_eps", "norm_eps mixer.norm_eps", default=1e-5),
        Fixed("expand_v", (1.0,)),
        Fixed("hidden_act", ("sqrelu",)),
        Fixed("norm_first", (True,)),
        Fixed("norm_bias", (True,)),
    ),
    outer=(
        *fla.OUTER,
        Tensor("model.norm.bias", "final_norm/bias"),
        Tensor("model.layers.0.pre_norm.weight", "embedding_norm/scale"),
        Tensor("model.layers.0.pre_norm.bias", "embedding_norm/bias"),
    ),
    layers=fla.LAYERS,
    inner=(
        Tensor("attn_norm.weight", "mixer_norm/scale"),
        Tensor("attn_norm.bias", "mixer_norm/bias"),
        Tensor("attn.x_proj.0.mu", "mixer/shift_mix"),
        Tensor("attn.x_bias", "mixer/mix", BLENDS),
        Tensor("attn.x_proj.0.linear.weight", "mixer/mix_in", BLENDS_IN),
        Tensor("attn.x_proj.2.weight", "mixer/mix_out", BLENDS_OUT),
        Tensor("attn.w_proj.linear.lora.2.bias", "mixer/decay_bias"),
        Tensor("attn.w_proj.linear.lora.0.weight", "mixer/decay_in_kernel"),
        Tensor("attn.w_proj.linear.lora.2.weight", "mixer/decay_out_kernel"),
        Tensor("attn.bonus", "mixer/bonus"),
        Tensor("attn.r_proj.linear.weight", "mixer/receptance_kernel"),
        Tensor("attn.k_proj.linear.weight", "mixer/key_kernel"),
        Tensor("attn.v_proj.linear.weight", "mixer/value_kernel"),
        Tensor("attn.g_proj.linear.weight", "mixer/gate_kernel"),
        Tensor("attn.g_norm.weight", "mixer/head_scale", FLAT),
        Tensor("attn.g_norm.bias", "mixer/head_bias", FLAT),
        Tensor("attn.o_proj.weight", "mixer/output_kernel"),
        Tensor("ffn_norm.weight", "channel_norm/scale"),
        Tensor("ffn_norm.bias", "channel_norm/bias"),
        Tensor("ffn.key.mu", "channel/key_mix"),
        Tensor("ffn.receptance.mu", "channel/receptance_mix"),
        Tensor("ffn.key.linear.weight", "channel/key_kernel"),
        Tensor("ffn.receptance.linear.weight", "channel/receptance_kernel"),
        Tensor("ffn.value.weight", "channel/output_kernel"),
    ),
    ours={"norm": "layer", "embedding_norm": True},
    ignored=fla.IGNORED,
)
