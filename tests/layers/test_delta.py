"""What the mixers of the delta rule have alike."""

import jax
import numpy as np
import pytest
from flax import nnx

from seqmodels import mixers
from seqmodels.layers import delta_beta


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "kda"])
def test_negative_eigenvalues_are_a_doubled_beta(name):
    module = mixers.load(name)
    x = 3.0 * jax.random.normal(jax.random.key(1), (1, 20, 32))
    plain, negative = (
        module.Mixer(module.Config(allow_neg_eigval=allow), 32, rngs=nnx.Rngs(params=0)) for allow in (False, True)
    )
    beta, doubled = (delta_beta(x, mixer.beta_kernel[...], mixer.config.allow_neg_eigval) for mixer in (plain, negative))
    np.testing.assert_allclose(doubled, 2 * beta, rtol=1e-6)
    assert beta.max() < 1 < doubled.max() < 2
    assert not np.allclose(plain(x)[0], negative(x)[0], atol=1e-2)
