"""HGRN, as flash-linear-attention saves it; the lower bounds of all layers are one tensor."""

from seqmodels.interop import fla
from seqmodels.interop.table import Field, Fixed, Kind, Tensor

KIND = Kind(
    model_type="hgrn",
    architecture="HGRNForCausalLM",
    library="flash-linear-attention",
    pattern="hgrn mlp",
    fields=(
        *fla.FIELDS,
        Field("norm_eps", "norm_eps mixer.norm_eps", default=1e-6),
        Fixed("expand_ratio", (1,)),
        Fixed("use_lower_bound", (True,)),
        fla.NO_CONV,
    ),
    outer=(*fla.OUTER, Tensor("model.lower_bounds", "mixer/lower_bound_logit")),
    layers=fla.LAYERS,
    inner=(
        *fla.INNER,
        Tensor("attn.i_proj.weight", "mixer/input_kernel"),
        Tensor("attn.f_proj.weight", "mixer/gate_logit_kernel"),
        Tensor("attn.g_proj.weight", "mixer/gate_kernel"),
        Tensor("attn.g_norm.weight", "mixer/norm/scale"),
    ),
    ignored=fla.IGNORED,
)
