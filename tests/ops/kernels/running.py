"""Where the tests of kernels run: compiled on the device they are for, if it is at hand (`JAX_PLATFORMS=cuda`), else interpreted."""

import contextlib

import jax

from seqmodels import ops


def kernels_of(device: str) -> contextlib.AbstractContextManager:
    """Inside this context ops with ``implementation="pallas"`` run the kernels for a device of ``ops.target.DEVICES``."""
    return contextlib.nullcontext() if jax.default_backend() == device else ops.interpret(device)
