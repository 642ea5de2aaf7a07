"""What flash-linear-attention's checkpoints have alike: a mixer and a gated MLP per layer, with a norm before each."""

from seqmodels.interop.table import Field, Fixed, Tensor


def mlp_hidden(width, theirs):
    """Where the config gives no width: 2/3 of hidden_ratio times the model's, up to a multiple of 256."""
    if width is not None:
        return width
    ratio = theirs["hidden_ratio"] if theirs.get("hidden_ratio") is not None else 4
    return -(-int(theirs["hidden_size"] * ratio * 2 / 3) // 256) * 256


OUTSIDE_FIELDS = (
    Field("vocab_size", "vocab_size"),
    Field("hidden_size", "d_model"),
    Field("num_hidden_layers", "repeats"),
    Field("tie_word_embeddings", "tie_embeddings", default=False),
    Fixed("attn", (None,)),  # layers of softmax attention in between
)
FIELDS = (
    *OUTSIDE_FIELDS,
    Field("intermediate_size", "channel.hidden", default=None, read=mlp_hidden),
    Field("hidden_act", "channel.activation", default="swish", choices={"swish": "silu", "silu": "silu"}),
    Fixed("elementwise_affine", (True,)),
)
NO_CONV = Fixed("use_short_conv", (False,))
# Whether a layer's norm and gate are one kernel of theirs (their default): the same mathematics, another name for the scale.
FUSED_GATE = Fixed("fuse_norm", (False, True))
GATED_NORM = Tensor("attn.g_norm.weight", "mixer/head_norm/scale", also="attn.g_norm_swish_gate.weight")
IGNORED = frozenset({"hidden_ratio", "conv_size"})

OUTER = (
    Tensor("model.embeddings.weight", "embedding"),
    Tensor("model.norm.weight", "final_norm/scale"),
    Tensor("lm_head.weight", "output_kernel"),
)
LAYERS = "model.layers.{}."
INNER = (
    Tensor("attn_norm.weight", "mixer_norm/scale"),
    Tensor("mlp_norm.weight", "channel_norm/scale"),
    Tensor("mlp.gate_proj.weight", "channel/gate_kernel"),
    Tensor("mlp.up_proj.weight", "channel/up_kernel"),
    Tensor("mlp.down_proj.weight", "channel/output_kernel"),
    Tensor("attn.o_proj.weight", "mixer/output_kernel"),
)
QUERIES_KEYS_VALUES = (
    Tensor("attn.q_proj.weight", "mixer/query_kernel"),
    Tensor("attn.k_proj.weight", "mixer/key_kernel"),
    Tensor("attn.v_proj.weight", "mixer/value_kernel"),
)
