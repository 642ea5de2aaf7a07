"""HiPPO-LegS and the modes made of it, against the reference's float64 numbers."""

import numpy as np
import pytest

from seqmodels.ops import hippo
from tests import goldens


def inits():
    return goldens.load("inits").arrays


def test_legs():
    A, B = hippo.legs(64)
    np.testing.assert_allclose(A, inits()["hippo_legs_A"], rtol=1e-14)
    np.testing.assert_allclose(B, inits()["hippo_legs_B"][:, 0], rtol=1e-14)


@pytest.mark.parametrize("kind, digits", [("lin", 1e-6), ("inv", 5e-6), ("real", 1e-6), ("legs", 1e-12)])
def test_modes(kind, digits):
    """The reference made all but LegS in float32, where the last of "inv" cancel."""
    np.testing.assert_allclose(hippo.diagonal_modes(kind, 32), inits()[f"s4d_{kind}_A"], rtol=digits)


def test_diagonal_plus_low_rank_is_legs_in_another_basis():
    """The same eigenvalues, -1 .. -N, and the same moments B^* A^l B, which no unitary change of basis alters."""
    A, P, B = hippo.normal_plus_low_rank_legs(16)
    full = [np.concatenate([x, x.conj()]) for x in (A, P, B)]
    dense = np.diag(full[0]) - np.outer(full[1], full[1].conj())
    legs_A, legs_B = hippo.legs(16)
    np.testing.assert_allclose(np.sort(np.linalg.eigvals(dense).real), -16.0 + np.arange(16.0), rtol=1e-5)
    for power in range(4):
        moved = full[2].conj() @ np.linalg.matrix_power(dense, power) @ full[2]
        np.testing.assert_allclose(moved, legs_B @ np.linalg.matrix_power(legs_A, power) @ legs_B, rtol=1e-12)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="kind='fout'"):
        hippo.diagonal_modes("fout", 4)
