"""Mamba, as transformers saves it. Their in_proj holds the inputs, and below them the gates."""

from seqmodels.interop import mamba_family
from seqmodels.interop.table import Derived, Field, Kind

KIND = Kind(
    model_type="mamba",
    architecture="MambaForCausalLM",
    library="transformers",
    pattern="mamba",
    fields=(
        *mamba_family.FIELDS,
        Field("tie_word_embeddings", "tie_embeddings", default=True),
        Field("expand", "mixer.expand", default=2),
        Derived("intermediate_size", lambda ours: ours["mixer.expand"] * ours["d_model"]),
        *mamba_family.SELECTIVE_FIELDS,
    ),
    outer=mamba_family.OUTER,
    layers="backbone.layers.{}.",
    inner=mamba_family.SELECTIVE_INNER,
    ours={"mixer.selection_norm": False},
    ignored=mamba_family.IGNORED,
)
