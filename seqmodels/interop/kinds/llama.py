"""Llama, as transformers saves it: attention with rotary positions and a gated MLP. Llama 3.1's scaled frequencies are not here."""

from seqmodels.interop.table import Field, Fixed, Kind, Tensor


def head_dim(ours):
    width = ours["mixer.head_dim"]
    return ours["d_model"] // ours["mixer.num_heads"] if width is None else width


def num_kv_heads(ours):
    heads = ours["mixer.num_kv_heads"]
    return ours["mixer.num_heads"] if heads is None else heads


KIND = Kind(
    model_type="llama",
    architecture="LlamaForCausalLM",
    library="transformers",
    pattern="attention mlp",
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("hidden_size", "d_model"),
        Field("num_hidden_layers", "repeats"),
        Field("num_attention_heads", "mixer.num_heads"),
        Field(
            "num_key_value_heads",
            "mixer.num_kv_heads",
            default=None,
            read=lambda heads, theirs: theirs["num_attention_heads"] if heads is None else heads,
            write=num_kv_heads,
        ),
        Field(
            "head_dim",
            "mixer.head_dim",
            default=None,
            read=lambda width, theirs: theirs["hidden_size"] // theirs["num_attention_heads"] if width is None else width,
            write=head_dim,
        ),
        Field("intermediate_size", "channel.hidden"),
        # transformers' "gelu" is the exact one, ours the approximation by tanh
        Field(
            "hidden_act",
            "channel.activation",
            default="silu",
            choices={"silu": "silu", "swish": "silu", "relu": "relu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"},
        ),
        Field("rms_norm_eps", "norm_eps", default=1e-6),
        Field("tie_word_embeddings", "tie_embeddings", default=False),
        Field("rope_parameters.rope_theta rope_theta", "mixer.rope_base", default=10000.0),
        Fixed("rope_parameters.rope_type", ("default",)),
        Fixed("rope_parameters.partial_rotary_factor partial_rotary_factor", (None, 1.0)),
        Fixed("rope_scaling", (None, {"rope_type": "default"}, {"type": "default"})),
        Fixed("attention_bias", (False,)),
        Fixed("mlp_bias", (False,)),
        Fixed("sliding_window", (None,)),
    ),
    outer=(
        Tensor("model.embed_tokens.weight", "embedding"),
        Tensor("model.norm.weight", "final_norm/scale"),
        Tensor("lm_head.weight", "output_kernel"),
    ),
    layers="model.layers.{}.",
    inner=(
        Tensor("input_layernorm.weight", "mixer_norm/scale"),
        Tensor("self_attn.q_proj.weight", "mixer/query_kernel"),
        Tensor("self_attn.k_proj.weight", "mixer/key_kernel"),
        Tensor("self_attn.v_proj.weight", "mixer/value_kernel"),
        Tensor("self_attn.o_proj.weight", "mixer/output_kernel"),
        Tensor("post_attention_layernorm.weight", "channel_norm/scale"),
        Tensor("mlp.gate_proj.weight", "channel/gate_kernel"),
        Tensor("mlp.up_proj.weight", "channel/up_kernel"),
        Tensor("mlp.down_proj.weight", "channel/output_kernel"),
    ),
)
