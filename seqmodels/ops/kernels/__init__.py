"""Pallas kernels, one file per recurrence and device: ``tpu/<name>.py`` and ``gpu/<name>.py`` (Mosaic, for
Hopper); what the kernels of a device share is its ``common.py``.

Each file has ``unsupported_reason(...)``, which says in a few words what keeps a call from its kernel (None if nothing does),
and the kernel's passes. Nothing else in the project imports Pallas.

| kernel | ``unsupported_reason`` is asked about | passes |
|---|---|---|
| chunk_scan | precision, channels, width, chunk_size | ``forward(chunk, state, *, precision, keep_starts, interpret)``, |
| | | ``backward(chunk, d_outputs, d_final, *, precision, interpret)`` |
| gated_linear_attention | q, k, v, decays (a head has), | ``forward(q, k, v, log_decay, start_log_mask, state, *, chunk_size, |
| (optional) | precision, chunk_size | read_before, precision, output_dtype, keep_starts, interpret)``, |
| | | ``backward(q, k, v, log_decay, start_log_mask, starts, d_output, d_final, *, chunk_size, |
| | | read_before, precision, interpret)`` |
| selective_scan | x, dt, A, B, C | ``forward(x, dt, A, B, C, state, reset, *, keep_starts, interpret)``, |
| | | ``backward(x, dt, A, B, C, reset, starts, dy, dfinal, *, interpret)`` |
| linear_recurrence | dtype | ``scan(a, b, carry, reset, *, reverse, interpret)`` |
| softmax_attention | q, k, v, cache, reset, window | ``attend(q, k, v, documents, window, *, interpret)`` |

What the passes take and give is the same on every device, and written where they are called (``chunk_scan.py``,
``selective_scan.py``, ``linear_recurrence.py``, ``softmax_attention.py``).
"""

import dataclasses
import importlib
import importlib.util
import types
from typing import Any

from seqmodels.ops import target

NAMES = {"tpu": "a TPU", "gpu": "an NVIDIA GPU"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel's passes, and whether they run in the interpreter: fixed when a function is traced, for its gradient as well."""

    passes: types.ModuleType
    interpret: bool


def find(name: str, **call: Any) -> Kernel | None:
    """The kernel of this name for the device that the caller is traced for, if there is one for this call."""
    return Kernel(_module(name), target.interpreting()) if _lacking(name, call) is None else None


def choose(implementation: str | None, name: str, op: str, **call: Any) -> Kernel | None:
    """The kernel that an op's ``implementation`` means, for the device that the caller is traced for.

    Args:
      implementation: ``"pallas"`` wants the kernel, ``None`` wants it where there is one; no other name does.
      name: the kernel.
      op: who asks, for the message.
      call: what the kernel's ``unsupported_reason`` wants to know.

    Raises:
      NotImplementedError: ``"pallas"``, and there is no kernel for this call; the message says why.
    """
    if implementation not in ("pallas", None):
        return None
    kernel = find(name, **call)
    if kernel is None and implementation == "pallas":
        raise NotImplementedError(f"{op} has no Pallas kernel for {_lacking(name, call)}")
    return kernel


def _lacking(name: str, call: dict[str, Any]) -> str | None:
    device = target.device()
    if device not in NAMES:
        return (
            f"this device ({device}): use implementation='chunked', or "
            "`with seqmodels.ops.interpret():` to run a TPU's or a GPU's kernel in its interpreter"
        )
    if importlib.util.find_spec(_path(name)) is None:
        return f"{NAMES[device]} yet: use implementation='chunked'"
    lacking = _module(name).unsupported_reason(**call)
    return None if lacking is None else f"this call: {lacking}; use implementation='chunked'"


def _path(name: str) -> str:
    return f"seqmodels.ops.kernels.{target.device()}.{name}"


def _module(name: str) -> types.ModuleType:
    return importlib.import_module(_path(name))
