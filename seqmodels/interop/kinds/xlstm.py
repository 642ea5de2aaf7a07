"""xLSTM, as transformers saves it: mLSTM in the block of the 7B model, a gated MLP, logits capped softly."""

from seqmodels.interop.table import Field, Fixed, Kind, Tensor

DEFAULT_LAYERS = 32


def num_blocks(blocks, theirs):
    """Their model has num_blocks blocks; num_hidden_layers counts where that is absent, and means nothing beside it.

    (``xLSTMConfig(num_blocks=2)`` is saved with the default of num_hidden_layers.)
    """
    if blocks is not None:
        return blocks
    name = "num_hidden_layers"
    return theirs[name] if name in theirs and theirs[name] is not None else DEFAULT_LAYERS


def mlp_hidden(factor, theirs):
    multiple = theirs["ffn_round_up_to_multiple_of"] if "ffn_round_up_to_multiple_of" in theirs else 64
    return int((theirs["hidden_size"] * factor + multiple - 1) // multiple * multiple)


KIND = Kind(
    model_type="xlstm",
    architecture="xLSTMForCausalLM",
    library="transformers",
    pattern="mlstm mlp",
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("hidden_size embedding_dim", "d_model"),
        Field("num_blocks", "repeats", default=None, read=num_blocks),
        Field("num_hidden_layers", "", default=None, read=lambda *_: (), write=lambda ours: ours["repeats"]),
        Field("num_heads", "mixer.num_heads", default=8),
        Field("qk_dim_factor", "mixer.key_expansion", default=0.5),
        Field("v_dim_factor", "mixer.value_expansion", default=1.0),
        # Written for a multiple of 1, with half a unit more, so that no rounding of the product falls below the width.
        Field(
            "ffn_proj_factor",
            "channel.hidden",
            default=2.667,
            read=mlp_hidden,
            write=lambda ours: (ours["channel.hidden"] + 0.5) / ours["d_model"],
        ),
        Field("ffn_round_up_to_multiple_of", "", default=64, read=lambda *_: (), write=lambda ours: 1),
        Field("norm_eps", "norm_eps mixer.norm_eps", default=1e-6),
        Field("gate_soft_cap", "mixer.gate_cap", default=15.0),
        Field("output_logit_soft_cap", "logit_cap", default=30.0),
        Field("tie_word_embeddings", "tie_embeddings", default=False),
        Fixed("eps", (1e-6,)),
        Fixed("use_bias", (False,)),
        Fixed("add_out_norm", (True,)),
        Fixed("weight_mode", ("single",)),
    ),
    outer=(
        Tensor("backbone.embeddings.weight", "embedding"),
        Tensor("backbone.out_norm.weight", "final_norm/scale"),
        Tensor("lm_head.weight", "output_kernel"),
    ),
    layers="backbone.blocks.{}.",
    inner=(
        Tensor("norm_mlstm.weight", "mixer_norm/scale"),
        Tensor("mlstm_layer.q.weight", "mixer/query_kernel"),
        Tensor("mlstm_layer.k.weight", "mixer/key_kernel"),
        Tensor("mlstm_layer.v.weight", "mixer/value_kernel"),
        Tensor("mlstm_layer.ogate_preact.weight", "mixer/gate_kernel"),
        Tensor("mlstm_layer.igate_preact.weight", "mixer/input_gate_logit_kernel"),
        Tensor("mlstm_layer.igate_preact.bias", "mixer/input_gate_logit_bias"),
        Tensor("mlstm_layer.fgate_preact.weight", "mixer/forget_gate_logit_kernel"),
        Tensor("mlstm_layer.fgate_preact.bias", "mixer/forget_gate_logit_bias"),
        Tensor("mlstm_layer.multihead_norm.weight", "mixer/head_norm_scale"),
        Tensor("mlstm_layer.out_proj.weight", "mixer/output_kernel"),
        Tensor("norm_ffn.weight", "channel_norm/scale"),
        Tensor("ffn.proj_up_gate.weight", "channel/gate_kernel"),
        Tensor("ffn.proj_up.weight", "channel/up_kernel"),
        Tensor("ffn.proj_down.weight", "channel/output_kernel"),
    ),
    ours={"mixer.block": "v2", "mixer.input_bias": -10.0},
    ignored=frozenset(
        "autocast_kernel_dtype chunk_size chunkwise_kernel sequence_kernel step_kernel inference_state_dtype "
        "max_inference_chunksize mode norm_reduction_force_float32 return_last_states mlstm_round_up_to_multiple_of".split()
    ),
)
