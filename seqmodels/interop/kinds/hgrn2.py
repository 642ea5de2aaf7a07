"""HGRN2, as flash-linear-attention saves it; its inner norm has an epsilon of 1e-5 whatever norm_eps says."""

from seqmodels.interop import fla
from seqmodels.interop.table import Derived, Field, Fixed, Kind, Tensor


def expand_ratio(theirs):
    return 128 if theirs.get("expand_ratio") is None else theirs["expand_ratio"]


KIND = Kind(
    model_type="hgrn2",
    architecture="HGRN2ForCausalLM",
    library="flash-linear-attention",
    pattern="hgrn2 mlp",
    fields=(
        *fla.FIELDS,
        Field(
            "num_heads",
            "mixer.num_heads",
            default=None,
            read=lambda heads, theirs: theirs["hidden_size"] // expand_ratio(theirs) if heads is None else heads,
        ),
        Derived("expand_ratio", lambda ours: ours["d_model"] // ours["mixer.num_heads"]),
        Field("norm_eps", "norm_eps", default=1e-6),
        Fixed("use_lower_bound", (True,)),
        fla.NO_CONV,
    ),
    outer=(*fla.OUTER, Tensor("model.lower_bounds", "mixer/lower_bound_logit")),
    layers=fla.LAYERS,
    inner=(
        *fla.INNER,
        Tensor("attn.q_proj.weight", "mixer/query_kernel"),
        Tensor("attn.f_proj.weight", "mixer/gate_logit_kernel"),
        Tensor("attn.i_proj.weight", "mixer/value_kernel"),
        Tensor("attn.g_norm.weight", "mixer/norm/scale"),
    ),
    ours={"mixer.norm_eps": 1e-5},
    ignored=fla.IGNORED,
)
