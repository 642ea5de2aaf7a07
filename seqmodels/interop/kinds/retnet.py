"""RetNet, as flash-linear-attention saves it: Llama's rotary pairs, and a scale on the heads' norm."""

from seqmodels.interop import fla
from seqmodels.interop.table import Field, Fixed, Kind, Tensor

KIND = Kind(
    model_type="retnet",
    architecture="RetNetForCausalLM",
    library="flash-linear-attention",
    pattern="retnet mlp",
    fields=(
        *fla.FIELDS,
        Field("num_heads", "mixer.num_heads", default=8),
        Field("expand_k", "mixer.key_expansion", default=1.0),
        Field("expand_v", "mixer.value_expansion", default=2.0),
        Field("norm_eps", "norm_eps mixer.norm_eps", default=1e-6),
        Fixed("num_kv_heads", (None,)),
        Fixed("feature_map", (None,)),
        Fixed("use_output_gate", (True,)),
        fla.NO_CONV,
        fla.FUSED_GATE,
    ),
    outer=fla.OUTER,
    layers=fla.LAYERS,
    inner=(
        *fla.INNER,
        *fla.QUERIES_KEYS_VALUES,
        Tensor("attn.g_proj.weight", "mixer/gate_kernel"),
        fla.GATED_NORM,
    ),
    ours={"mixer.rope": "llama", "mixer.rope_base": 10000.0, "mixer.norm_scale": True},
    ignored=fla.IGNORED,
)
