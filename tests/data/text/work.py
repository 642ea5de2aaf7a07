"""What a batch costs, counted: numbers read of arrays that grow with the text, and bytes allocated beside them."""

import tracemalloc
from collections.abc import Iterable

import numpy as np


class Counted:
    """An array that counts the numbers read of it; a search reads as many as there are halvings."""

    def __init__(self, array: np.ndarray):
        self._array, self.read = array, 0
        self.shape, self.dtype = array.shape, array.dtype

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, key):
        found = self._array[key]
        self.read += found.size
        return found

    def searchsorted(self, values, side="left", sorter=None):
        self.read += np.size(values) * len(self).bit_length()
        return self._array.searchsorted(values, side=side, sorter=sorter)

    def __array__(self, dtype=None, copy=None):
        self.read += len(self)
        return np.array(self._array, dtype)


def most_of_a_batch(batches: Iterable, arrays: Iterable[Counted]) -> tuple[int, int]:
    """Numbers read of ``arrays``, and bytes allocated at the peak, of the batch that has most of each."""
    batches, arrays = iter(batches), list(arrays)
    read, allocated = [], []
    tracemalloc.start()
    while True:
        tracemalloc.reset_peak()
        read_before, allocated_before = sum(each.read for each in arrays), tracemalloc.get_traced_memory()[0]
        if next(batches, None) is None:
            break
        read.append(sum(each.read for each in arrays) - read_before)
        allocated.append(tracemalloc.get_traced_memory()[1] - allocated_before)
    tracemalloc.stop()
    return max(read), max(allocated)
