"""Which words could have been recalled: next-token loss where the text repeats itself, apart from the rest.

A target y_t after the input x_t is a hit if the same pair (x_t, y_t) stood earlier in the same story and in the same window,
so that a model which remembers it can look the answer up (the idea of Arora et al. 2023, arXiv 2312.04927, section 3).
Mixers differ on these first.
"""

import numpy as np
from jaxtyping import Bool, Integer


def is_repeated_bigram(
    inputs: Integer[np.ndarray, "N"], targets: Integer[np.ndarray, "N"], groups: Integer[np.ndarray, "N"]
) -> Bool[np.ndarray, "N"]:
    """True where (input, target) has occurred at an earlier place with the same group.

    Args:
        inputs: the token read before each target.
        targets: the tokens to predict, in order.
        groups: what a model can look back over, as one number per target: its story and window.
    """
    words = int(max(inputs.max(), targets.max())) + 1 if len(targets) else 1
    _, group = np.unique(groups, return_inverse=True)
    pairs = (group.astype(np.int64) * words + inputs) * words + targets
    _, first = np.unique(pairs, return_index=True)
    found = np.ones(len(targets), bool)
    found[first] = False
    return found
