"""What every test of a GPU kernel asks: JAX's interpreter for them, and that it saw no race."""

import jax
import pytest

from seqmodels.ops.kernels.gpu import common


def pytest_collection_modifyitems(items):
    if jax.__version_info__ < common.NEEDS_JAX:
        needed = ".".join(map(str, common.NEEDS_JAX))
        skip = pytest.mark.skip(reason=f"the kernels for GPUs need JAX {needed} or later, and this is {jax.__version__}")
        for item in items:
            if "gpu_kernels" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def no_races(request, capfd):
    yield
    if "gpu_kernels" in request.keywords:
        assert "RACE DETECTED" not in capfd.readouterr().out
