"""Repeated bigrams: the tokens that a model could recall from its context (Arora et al. 2023, arXiv 2312.04927, section 3).

A target y_t after the input x_t repeats a bigram if the pair (x_t, y_t) stood earlier in the same story and the same window, and
is not frequent in the training split. A model that recalls its context can predict such a token; frequent pairs are left out as a
model knows them from training (Arora et al. leave out pairs seen more than 1,250 times).
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int32, Integer

# A pair is frequent from this share of the training split's tokens on: in two million tokens it is met FREQUENT * 2e6 times.
FREQUENT = 1e-5
SAMPLE, BLOCK = 2**24, 2**16  # tokens of the training split that are counted, in blocks spread evenly over it


def frequent_pairs(tokens: Integer[np.ndarray, " N"]) -> Int32[np.ndarray, "pairs 2"]:
    """The pairs of neighbours that make up at least FREQUENT of a text of some tokens, counted on at most SAMPLE of them."""
    vocab_size = 1 + max(int(block.max()) for block in _blocks(tokens))
    pairs = np.concatenate([block[:-1].astype(np.int64) * vocab_size + block[1:] for block in _blocks(tokens)])
    found, counts = np.unique(pairs, return_counts=True)
    found = found[counts >= max(FREQUENT * len(pairs), 2)]  # met once, a pair of a small text is not known to be frequent
    return np.stack([found // vocab_size, found % vocab_size], axis=1).astype(np.int32)


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
        frequent: pairs that do not count (see `frequent_pairs`).
    """
    vocab_size = int(max(inputs.max(), targets.max())) + 1 if len(targets) else 1
    _, group = np.unique(groups, return_inverse=True)
    pairs = inputs.astype(np.int64) * vocab_size + targets
    _, first = np.unique(group.astype(np.int64) * vocab_size * vocab_size + pairs, return_index=True)
    found = np.ones(len(targets), bool)
    found[first] = False
    if frequent is not None:
        inside = frequent[(frequent < vocab_size).all(axis=1)].astype(np.int64)  # the others do not occur
        found &= ~np.isin(pairs, inside[:, 0] * vocab_size + inside[:, 1])
    return found
