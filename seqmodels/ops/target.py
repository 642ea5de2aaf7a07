"""The device that a function is traced for: the one JAX runs on, or another that is interpreted or compiled for."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

DEVICES = ("cpu", "tpu", "gpu")

_named = contextvars.ContextVar("seqmodels_ops_device", default=None)
_interpreting = contextvars.ContextVar("seqmodels_ops_interpreting", default=False)


@contextlib.contextmanager
def interpret(device: str = "tpu") -> Iterator[None]:
    """Inside this context the Pallas kernels for ``device`` run in their interpreter, on any machine.

    Read when a function is traced: a function that was compiled outside stays as it is.
    """
    tokens = _named.set(_known(device)), _interpreting.set(True)
    try:
        yield
    finally:
        _named.reset(tokens[0])
        _interpreting.reset(tokens[1])


@contextlib.contextmanager
def compile_for(device: str) -> Iterator[None]:
    """Inside this context functions are traced for ``device``: its kernels, chunk sizes and schedules.

    For compiling ahead of time on a machine without it.
    """
    token = _named.set(_known(device))
    try:
        yield
    finally:
        _named.reset(token)


def interpreting() -> bool:
    """Whether the caller is inside ``interpret()``."""
    return _interpreting.get()


def device() -> str:
    """What the caller is traced for, one of DEVICES."""
    named = _named.get()
    return jax.default_backend() if named is None else named


def _known(device):
    if device not in DEVICES:
        raise ValueError(f"device={device!r} is not one of {', '.join(DEVICES)}")
    return device
