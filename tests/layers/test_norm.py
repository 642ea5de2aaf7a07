"""The shared parts that more than one mixer is built from."""

import jax
import pytest

from seqmodels.layers import gated_rms_norm
from tests.goldens import load
from tests.mixers.goldens import assert_close


@pytest.mark.parametrize(("name", "num_groups"), [("gatefirst_full", 1), ("gatefirst_g8", 3)])
def test_gated_norm_of_the_authors_of_mamba(name, num_groups):
    arrays = load("rmsnorm_gated").arrays

    def norm(x, z, w):
        return gated_rms_norm(x, z, w, eps=1e-5, num_groups=num_groups)

    output, pull = jax.vjp(norm, *(arrays[key] for key in "xzw"))
    assert_close(output, arrays[f"o_{name}"], 1e-6)
    for gradient, key in zip(pull(arrays[f"cot_{name}"]), "xzw"):
        assert_close(gradient, arrays[f"grad_{name}_{key}"], 2e-6, f"gradient of {key}")


def test_groups_that_do_not_divide_are_refused():
    x = load("rmsnorm_gated").arrays["x"]
    with pytest.raises(ValueError, match="num_groups=5 must divide"):
        gated_rms_norm(x, x, eps=1e-5, num_groups=5)
