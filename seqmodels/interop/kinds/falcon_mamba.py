"""FalconMamba, as transformers saves it: Mamba with a norm on each of the step sizes' inputs, B and C."""

from seqmodels.interop import mamba_family
from seqmodels.interop.table import Field, Kind


def expansion(width, theirs):
    """Of this kind intermediate_size counts where there is one, whatever expand says (the 7B model's says 16)."""
    if width is None:
        return theirs["expand"] if "expand" in theirs else 2
    d_model = theirs["hidden_size"]
    if width % d_model:
        raise ValueError(f"it must be a multiple of hidden_size={d_model}")
    return width // d_model


KIND = Kind(
    model_type="falcon_mamba",
    architecture="FalconMambaForCausalLM",
    library="transformers",
    pattern="mamba",
    fields=(
        *mamba_family.FIELDS,
        Field("tie_word_embeddings", "tie_embeddings", default=True),
        Field(
            "intermediate_size",
            "mixer.expand",
            default=None,
            read=expansion,
            write=lambda ours: ours["mixer.expand"] * ours["d_model"],
        ),
        *mamba_family.SELECTIVE_FIELDS,
        Field("mixer_rms_eps", "mixer.selection_norm_eps", default=1e-6),
    ),
    outer=mamba_family.OUTER,
    layers="backbone.layers.{}.",
    inner=mamba_family.SELECTIVE_INNER,
    ours={"mixer.selection_norm": True},
    ignored=mamba_family.IGNORED | {"expand"},
)
