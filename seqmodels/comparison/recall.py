"""Which tokens could have been recalled: next-token loss where the text repeats what is rare elsewhere, apart from the rest.

A target y_t after the input x_t is a hit if the same pair (x_t, y_t) stood earlier in the same story and in the same window,
so that a model which remembers it can look the answer up, and if the pair is not frequent in the training split, so that a model
which remembers nothing does not know it from there (Arora et al. 2023, arXiv 2312.04927, section 3, who leave out pairs
seen more than 1,250 times in training).
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int32, Integer

# A pair is frequent from this share of the training split's tokens on: in two million tokens it is met FREQUENT * 2e6 times.
FREQUENT = 1e-5
SAMPLE, BLOCK = 2**24, 2**16  # tokens of the training split that are counted, in blocks spread evenly over it


def frequent_pairs(tokens: Integer[np.ndarray, " N"]) -> Int32[np.ndarray, "pairs 2"]:
    """The pairs of neighbours that make up at least FREQUENT of a text of some tokens, counted on at most SAMPLE of them."""
    words = 1 + max(int(block.max()) for block in _blocks(tokens))
    pairs = np.concatenate([block[:-1].astype(np.int64) * words + block[1:] for block in _blocks(tokens)])
    found, counts = np.unique(pairs, return_counts=True)
    found = found[counts >= max(FREQUENT * len(pairs), 2)]  # met once, a pair of a small text is not known to be frequent
    return np.stack([found // words, found % words], axis=1).astype(np.int32)


def _blocks(tokens: Integer[np.ndarray, " N"]) -> Iterator[np.ndarray]:
    number = max(1, min(len(tokens), SAMPLE) // BLOCK)
    size = len(tokens) if number == 1 else BLOCK
    for begin in np.linspace(0, len(tokens) - size, number, dtype=np.int64):
        yield tokens[begin : begin + size]


def is_repeated_bigram(
    inputs: Integer[np.ndarray, " N"],
    targets: Integer[np.ndarray, " N"],
    groups: Integer[np.ndarray, " N"],
    frequent: Integer[np.ndarray, "pairs 2"] | None = None,
) -> Bool[np.ndarray, " N"]:
    """True where (input, target) has occurred at an earlier place with the same group and is not frequent.

    Args:
        inputs: the token read before each target.
        targets: the tokens to predict, in order.
        groups: what a model can look back over, as one number per target: its story and window.
        frequent: pairs that are no hits (see `frequent_pairs`).
    """
    words = int(max(inputs.max(), targets.max())) + 1 if len(targets) else 1
    _, group = np.unique(groups, return_inverse=True)
    pairs = inputs.astype(np.int64) * words + targets
    _, first = np.unique(group.astype(np.int64) * words * words + pairs, return_index=True)
    found = np.ones(len(targets), bool)
    found[first] = False
    if frequent is not None:
        inside = frequent[(frequent < words).all(axis=1)].astype(np.int64)  # the others do not occur
        found &= ~np.isin(pairs, inside[:, 0] * words + inside[:, 1])
    return found
