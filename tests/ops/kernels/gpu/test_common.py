"""What the kernels for GPUs need, said where it is missing."""

import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import ops
from seqmodels.ops.kernels.gpu import common
from tests.ops.kernels.running import kernels_of


def test_an_older_jax_is_told_which_is_needed(monkeypatch):
    monkeypatch.setattr(common, "NEEDS_JAX", (99, 1))
    a = jnp.full((1, 3, 2), 0.5)
    with kernels_of("gpu"):
        with pytest.raises(NotImplementedError, match=r"JAX 99\.1 or later, and this is"):
            ops.linear_recurrence(a, a, implementation="pallas")
        h, _ = ops.linear_recurrence(a, a)  # falls back to the chunked form
    assert h[0, :, 0].tolist() == [0.5, 0.75, 0.875]


def test_marks_are_rows_of_16_bytes():
    marks = common.marks(jnp.array([[True, False, True], [False, False, True]]), 4)
    assert marks.dtype == jnp.int32 and marks.tolist() == [[x] * 4 for x in (1, 0, 1, 0, 0, 0, 1, 0)]


def test_a_long_axis_of_a_grid_is_its_last(monkeypatch):
    grids = []
    monkeypatch.setattr(common.plgpu, "kernel", lambda body, **options: grids.append((options["grid_names"], options["grid"])))
    for heads in (65_535, 65_536):
        common.launch(None, out_type=[], scratch_types=[], grid={"head": heads, "block": 2}, interpret=False)
    assert grids == [(("head", "block"), (65_535, 2)), (("block", "head"), (2, 65_536))]


@pytest.mark.gpu_kernels
def test_more_rows_than_an_axis_of_a_grid_has_blocks(monkeypatch):
    monkeypatch.setattr(common, "LONGEST", 2)
    a = jnp.linspace(0.1, 0.9, 3 * 2 * 130).reshape(3, 2, 130)
    with kernels_of("gpu"):
        h, final = ops.linear_recurrence(a, a, implementation="pallas")
    np.testing.assert_allclose(h[:, 1], a[:, 1] * (1 + a[:, 0]), rtol=1e-6)
    np.testing.assert_array_equal(final, h[:, 1])
