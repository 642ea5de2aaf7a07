"""The size solver: every mixer matched within 1 %, or refused with the closest named; and what it may not do."""

import pytest

from configs import base
from seqmodels import mixers
from seqmodels.comparison import sizes
from seqmodels.comparison.sizes import Sizes
from seqmodels.errors import UserError

VOCAB_SIZE = 256
TOLERANCE = 0.01


def nested(**overrides) -> dict:
    config = base.get_config()
    config.data.seq_len = 32
    config.model.d_model, config.model.repeats = 64, 4
    config.update_from_flattened_dict(overrides)
    return config.copy_and_resolve_references().to_dict()


def reference(quantity: str, values: dict) -> float:
    return sizes.count(quantity, sizes.with_sizes(values, sizes.base_sizes(values, "attention mlp")), VOCAB_SIZE)


def matched(name: str, quantity: str = "params", pattern: str | None = None, **overrides) -> sizes.Matched:
    values = nested(**overrides)
    pattern = mixers.pattern(name) if pattern is None else pattern
    target = reference(quantity, values)
    found = sizes.match(name, quantity, values, pattern, VOCAB_SIZE, target=target, tolerance=TOLERANCE)
    counted = sizes.count(quantity, sizes.with_sizes(values, found.sizes), VOCAB_SIZE)
    assert counted == found.counted and found.of_reference == pytest.approx(counted / target - 1.0)
    assert abs(counted / target - 1.0) <= TOLERANCE
    return found


@pytest.mark.tools
@pytest.mark.parametrize("name", mixers.names())
def test_parameters_of_every_mixer(name):
    """Either matched, near the base; or an error that names the closest sizes and by how much they miss."""
    try:
        found = matched(name)
    except UserError as refusal:
        assert "the closest is" in str(refusal) and "%" in str(refusal)
        assert name not in ("attention", "gla", "mamba", "mlstm", "lstm"), "these are known to match"
        return
    assert 32 <= found.sizes.d_model <= 128 and 2 <= sizes.shortest(found.sizes.pattern, found.sizes.repeats)[1] <= 16
    if "mlp" in mixers.pattern(name).split():
        assert found.sizes.d_model == 64, "MLPs and repeats are changed before the width"


def test_what_matches_is_left_alone():
    assert matched("attention").sizes == Sizes("attention mlp", 4, 64, None)


def test_repeats_of_layers_without_mlps_are_counted_singly():
    assert sizes.shortest("mamba mamba", 4) == ("mamba", 8)
    assert sizes.shortest("gla mlp gla mlp", 3) == ("gla mlp", 6)
    assert sizes.shortest("gla mlp attention", 2) == ("gla mlp attention", 2)
    assert "mamba mamba" not in str(matched("mamba").sizes) or matched("mamba").sizes.repeats == 4


@pytest.mark.parametrize("name", ["gla", "lstm"])
def test_flops(name):
    matched(name, "flops")


@pytest.mark.tools
def test_state_bytes():
    """A window's state does not grow with MLPs: width and repeats have to do it."""
    found = matched("linear_attention", "state_bytes", **{"model.mixers.attention.window": 16})
    assert (found.sizes.d_model, found.sizes.repeats) != (64, 4)


def test_refusal_names_the_closest():
    """One token more or less of a cache of 4,096 cannot be had from a fixed state of this width and depth."""
    with pytest.raises(
        UserError, match=r"hgrn does not come within 1.0% of [\d,]+ bytes of state.*closest is .* x \[hgrn, mlp\]"
    ):
        matched("hgrn", "state_bytes", **{"data.seq_len": 4096})


def test_a_mistake_in_the_base_is_said():
    with pytest.raises(UserError, match="gla.num_heads=7"):
        matched("gla", **{"model.mixers.gla.num_heads": 7})
