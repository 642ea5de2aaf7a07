"""State matrices that remember: HiPPO-LegS, its normal plus low-rank form, and the diagonal approximations of S4D.

float64 numpy, for use at construction. Modes are half of conjugate pairs, those with an imaginary part <= 0, the fastest
rotation first for LegS and Inv.
"""

import numpy as np
from jaxtyping import Complex, Float

MODES = ("lin", "inv", "real", "legs")


def legs(states: int) -> tuple[Float[np.ndarray, "N N"], Float[np.ndarray, " N"]]:
    """``(A, B)`` of HiPPO-LegS: dx/ds = A x + B u keeps the Legendre coefficients of u's past (arXiv 2111.00396, eq. 2).

    A[n, k] = -sqrt((2 n + 1) (2 k + 1)) below the diagonal, -(n + 1) on it; B[n] = sqrt(2 n + 1).
    """
    n = np.arange(states)
    B = np.sqrt(2.0 * n + 1.0)
    return -np.tril(np.outer(B, B), -1) - np.diag(n + 1.0), B


def normal_plus_low_rank_legs(
    states: int,
) -> tuple[Complex[np.ndarray, " M"], Complex[np.ndarray, " M"], Complex[np.ndarray, " M"]]:
    """``(A, P, B)``: HiPPO-LegS in the basis where it is diag(A) - P P^* (arXiv 2111.00396, theorem 1 and appendix C.1).

    With P[n] = sqrt(n + 1/2), LegS + P P^T is -1/2 plus a skew-symmetric matrix, whose eigenvectors are unitary. Their phases
    are arbitrary, and with them those of P and B, together.
    """
    A, B = legs(states)
    P = np.sqrt(np.arange(states) + 0.5)
    skew = A + np.outer(P, P) + 0.5 * np.eye(states)
    rates, vectors = np.linalg.eigh(-1j * skew)
    half = rates < 0.0
    into_basis = vectors[:, half].conj().T
    return -0.5 + 1j * rates[half], into_basis @ P, into_basis @ B


def diagonal_modes(kind: str, modes: int) -> Complex[np.ndarray, " M"]:
    """The diagonal of S4D's state matrix (arXiv 2206.11893, section 4), N = 2 M, n = 0 .. M - 1.

    lin: -1/2 - i pi n; inv: -1/2 - i N / pi (N / (2 n + 1) - 1); real: -(n + 1); legs: the eigenvalues above.

    Raises:
      ValueError: an unknown kind.
    """
    if kind not in MODES:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(MODES)}")
    n, states = np.arange(modes), 2 * modes
    if kind == "lin":
        return -0.5 - 1j * np.pi * n
    if kind == "inv":
        return -0.5 - 1j * states / np.pi * (states / (2 * n + 1) - 1)
    if kind == "real":
        return -(n + 1.0) + 0j
    return normal_plus_low_rank_legs(states)[0]
