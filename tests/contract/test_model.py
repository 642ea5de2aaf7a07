"""A whole language model keeps the contract of its mixers: a hybrid, its head tied or not; states outside its mixers."""

import dataclasses

import numpy as np
import pytest

from seqmodels.model import LanguageModel, ModelConfig
from tests.configs import layer_configs
from tests.contract import laws
from tests.programs import build

HYBRID = "attention mlp linear_attention mlp"
VOCAB = 50


@dataclasses.dataclass(frozen=True)
class Builder:
    tie_embeddings: bool
    pattern: str = HYBRID
    short_conv: str = "own"

    def __call__(self, implementation, dtype):
        config = ModelConfig(
            d_model=32,
            pattern=self.pattern,
            repeats=2,
            short_conv=self.short_conv,
            tie_embeddings=self.tie_embeddings,
            embedding_norm=False,
            branch_rms=None,
            compute_dtype=dtype.name,
            **layer_configs(self.pattern, implementation=implementation),
        )
        model = build(lambda rngs: LanguageModel(config, VOCAB, rngs=rngs))
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
OUTSIDE_MIXERS = (laws.split, laws.stepwise, laws.reset, laws.rows, laws.left_padding)
SUBJECTS = {
    "tied": (Builder(tie_embeddings=True), TIED),
    "untied": (Builder(tie_embeddings=False), UNTIED),
    "rwkv6_mlp": (Builder(tie_embeddings=True, pattern="rwkv6 rwkv_channel_mix"), OUTSIDE_MIXERS),
    "short_conv": (
        Builder(tie_embeddings=True, pattern="attention+gla mlp", short_conv="all"),
        (*OUTSIDE_MIXERS, laws.state_size),
    ),
}
IN_MAKE_TEST = ("tied",)  # the others are in `make test-tools`
PARAMETERS = [
    pytest.param(
        builder,
        law,
        id=f"{name}-{law.name}",
        marks=[pytest.mark.xdist_group(f"model-{name}"), *(() if name in IN_MAKE_TEST else (pytest.mark.tools,))],
    )
    for name, (builder, measures) in SUBJECTS.items()
    for law in laws.LAWS
    if law.measure in measures
]


@pytest.mark.parametrize(("builder", "law"), PARAMETERS)
def test_law(builder, law):
    worst = law.measure(laws.Case("model", builder, None))
    assert worst <= law.bound, f"{law.statement} Worst error {worst:.2e}, allowed {law.bound:.0e}."
