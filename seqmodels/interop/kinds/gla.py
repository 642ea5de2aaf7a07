"""Gated linear attention, as flash-linear-attention saves it; its rank of 16 and root of 16 are not in its config."""

from seqmodels.interop import fla
from seqmodels.interop.table import Field, Fixed, Kind, Tensor

KIND = Kind(
    model_type="gla",
    architecture="GLAForCausalLM",
    library="flash-linear-attention",
    pattern="gla mlp",
    fields=(
        *fla.FIELDS,
        Field("num_heads", "mixer.num_heads", default=4),
        Field("expand_k", "mixer.key_expansion", default=0.5),
        Field("expand_v", "mixer.value_expansion", default=1.0),
        Field("norm_eps", "norm_eps mixer.norm_eps", default=1e-6),
        Fixed("num_kv_heads", (None,)),
        Fixed("feature_map", (None,)),
        Fixed("use_output_gate", (True,)),
        Fixed("use_gk", (True,)),
        Fixed("use_gv", (False,)),
        Fixed("clamp_min", (None,)),
        fla.NO_CONV,
        fla.FUSED_GATE,
    ),
    outer=fla.OUTER,
    layers=fla.LAYERS,
    inner=(
        *fla.INNER,
        *fla.QUERIES_KEYS_VALUES,
        Tensor("attn.g_proj.weight", "mixer/gate_kernel"),
        Tensor("attn.gk_proj.0.weight", "mixer/decay_in_kernel"),
        Tensor("attn.gk_proj.1.weight", "mixer/decay_out_kernel"),
        Tensor("attn.gk_proj.1.bias", "mixer/decay_bias"),
        fla.GATED_NORM,
    ),
    ours={"mixer.decay_rank": 16, "mixer.temperature": 16.0},
    ignored=fla.IGNORED,
)
