"""Linear attention, as flash-linear-attention saves it: with a norm in every head, after the normaliser where there is one."""

from seqmodels.interop import fla
from seqmodels.interop.table import Field, Fixed, Kind, Tensor

NORMALISER_EPS = 1e-10  # what fla adds to the denominator

KIND = Kind(
    model_type="linear_attn",
    architecture="LinearAttentionForCausalLM",
    library="flash-linear-attention",
    pattern="linear_attention mlp",
    fields=(
        *fla.FIELDS,
        Field("num_heads", "mixer.num_heads", default=4),
        Field(
            "feature_map",
            "mixer.feature_map",
            default="elementwise_product",
            choices={"elu": "elu", "relu": "relu", "identity": "identity"},
        ),
        Field("norm_feature_map", "mixer.normalize", default=False),
        Field(
            "norm_eps",
            "norm_eps mixer.norm_eps mixer.eps",
            default=1e-6,
            read=lambda eps, theirs: (eps, eps, NORMALISER_EPS) if theirs.get("norm_feature_map") else (eps, None, eps),
        ),
        Fixed("expand_k", (1.0,)),
        Fixed("expand_v", (1.0,)),
        Fixed("num_kv_heads", (None,)),
        Fixed("norm_q", (False,)),
        Fixed("norm_k", (False,)),
    ),
    outer=fla.OUTER,
    layers=fla.LAYERS,
    inner=(
        *fla.INNER,
        *fla.QUERIES_KEYS_VALUES,
        Tensor("attn.norm.weight", "mixer/output_norm/scale"),
    ),
    ignored=fla.IGNORED | {"tie_feature_map_qk"},
)
