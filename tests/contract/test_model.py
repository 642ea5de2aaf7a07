"""A whole language model keeps the contract of its mixers: a hybrid, its layers stacked, its head tied or not."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from seqmodels import mixers
from seqmodels.model import LanguageModel, ModelConfig
from tests.contract import laws

PATTERN = "attention mlp linear_attention mlp"
VOCAB = 50


@dataclasses.dataclass(frozen=True)
class Builder:
    tie_embeddings: bool

    def __call__(self, implementation, dtype):
        options = {name: mixers.load(name).Config for name in ("attention", "linear_attention")}
        config = ModelConfig(
            d_model=32,
            pattern=PATTERN,
            repeats=2,
            mixers=tuple((name, config(implementation=implementation)) for name, config in options.items()),
            mlp_hidden=None,
            mlp_activation="silu",
            tie_embeddings=self.tie_embeddings,
            norm_eps=1e-5,
            dropout=0.0,
            remat=False,
            compute_dtype=dtype.name,
        )
        model = LanguageModel(config, VOCAB, rngs=nnx.Rngs(params=0))
        return laws.Subject(model, sample_tokens, batch_axis=1)


def sample_tokens(generator: np.random.Generator, length: int) -> np.ndarray:
    return generator.integers(0, VOCAB, (laws.BATCH, length), dtype=np.int32)


# Implementations, their gradients and strong decays are the mixers' business.
TIED = (
    laws.split,
    laws.stepwise,
    laws.causality,
    laws.reset,
    laws.rows,
    laws.left_padding,
    laws.bfloat16,
    laws.state_size,
)
UNTIED = (laws.left_padding,)  # only the head differs
PARAMETERS = [
    pytest.param(
        tied,
        law,
        id=f"{'tied' if tied else 'untied'}-{law.name}",
        marks=pytest.mark.xdist_group(f"model-{tied}"),
    )
    for tied, measures in ((True, TIED), (False, UNTIED))
    for law in laws.LAWS
    if law.measure in measures
]


@pytest.mark.parametrize(("tie_embeddings", "law"), PARAMETERS)
def test_law(tie_embeddings, law):
    worst = law.measure(laws.Case("model", Builder(tie_embeddings), None))
    assert worst <= law.bound, f"{law.statement} Worst error {worst:.2e}, allowed {law.bound:.0e}."
