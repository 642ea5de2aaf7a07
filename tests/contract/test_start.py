"""The start is one law for all mixers: what enters the residual stream, and how much each layer adds, by depth and width.

On sentences of the toy source, which repeat words as text does, each of the n layers adds a vector of rms ``branch_rms / sqrt(n)``
within BRANCH, and the token explains at least SHARE of the variance of the stream after every layer.
"""

import jax
import numpy as np
import pytest

from seqmodels import mixers
from seqmodels.comparison import audit
from seqmodels.data.text import toy
from tests.configs import START, tiny

BRANCH = (0.5, 2.0)  # times branch_rms / sqrt(layers); the scale is set on random tokens, and text is more alike
SHARE = 0.8
VOCAB = 256


def figures(name, d_model, repeats):
    pattern = mixers.pattern(name)
    config = tiny(**START | {"model.pattern": pattern, "model.d_model": d_model, "model.repeats": repeats}).model
    return config, audit.start_figures(config, VOCAB, jax.random.key(0), text(), gradients=False)


def text(rows=4, length=64):
    joined = "".join(toy.stories("train", 20)).encode()[: rows * length]
    return np.frombuffer(joined, np.uint8).astype(np.int32).reshape(rows, length)


def check(name, d_model, repeats):
    config, found = figures(name, d_model, repeats)
    assert found.token_rms == pytest.approx(1.0, rel=0.02)  # 0.988: the norm has an epsilon
    wanted = config.branch_rms * len(found.branch_rms) ** -0.5
    for depth, (branch, share) in enumerate(zip(found.branch_rms, found.token_share)):
        assert BRANCH[0] * wanted <= branch <= BRANCH[1] * wanted, (depth, branch / wanted)
        assert share >= SHARE, (depth, share)


# One of each family; six CPU seconds a mixer go into compiling.
QUICK = ("attention", "mamba")
IN_TOOLS = ("hgrn", "lstm")
OTHERS = [name for name in mixers.names() if name not in (*QUICK, *IN_TOOLS)]
NAMES = [
    *QUICK,
    *(pytest.param(name, marks=pytest.mark.tools) for name in IN_TOOLS),
    *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS),
]


@pytest.mark.parametrize("name", NAMES)
def test_every_mixer_starts_alike(name):
    check(name, 64, 1)


@pytest.mark.slow
@pytest.mark.parametrize("d_model, repeats", [(64, 16), (256, 4), (1024, 1)])
@pytest.mark.parametrize("name", mixers.names())
def test_every_mixer_starts_alike_at_every_size(name, d_model, repeats):
    check(name, d_model, repeats)


@pytest.mark.tools
def test_without_the_rule_mixers_start_unlike():
    """The older start, which the law exists for: attention's token is drowned where Mamba's is not."""
    shares = {}
    for name in ("attention", "mamba"):
        older = {"model.pattern": mixers.pattern(name), "model.embedding_norm": False, "model.branch_rms": None}
        config = tiny(**older, **{"model.d_model": 64}).model
        shares[name] = audit.start_figures(config, VOCAB, jax.random.key(0), text(), gradients=False).token_share[0]
    assert shares["attention"] < 0.5 * shares["mamba"]
