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
| delta_rule | as gated_linear_attention | ``forward(q, k, v, beta, log_decay, state, *, keep_starts, interpret)``, |
| (optional) | | ``backward(q, k, v, beta, log_decay, kept, d_output, d_final, *, interpret)`` |
| selective_scan | x, dt, A, B, C, chunk_size | ``forward(x, dt, A, B, C, state, reset, *, keep_starts, interpret)``, |
| | | ``backward(x, dt, A, B, C, reset, starts, d_y, d_final, *, interpret)`` |
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

    name: str  # device/name
    passes: types.ModuleType
    interpret: bool


@dataclasses.dataclass(frozen=True)
class Unsupported:
    """Why there is no kernel: ``message`` for who asked for one; ``reason`` where the device has it and the call is the cause."""

    name: str  # device/name
    message: str
    reason: str | None


def find(name: str, **call: Any) -> Kernel | Unsupported:
    """The kernel of this name for the device that the caller is traced for, if there is one for this call.

    Args:
      call: what the kernel's ``unsupported_reason`` wants to know.
    """
    device = target.device()
    place, path = f"{device}/{name}", f"seqmodels.ops.kernels.{device}.{name}"
    if device not in NAMES:
        return Unsupported(place, (
            f"this device ({device}): use implementation='chunked', or "
            "`with seqmodels.ops.interpret():` to run a TPU's or a GPU's kernel in its interpreter"
        ), None)  # fmt: skip
    if importlib.util.find_spec(path) is None:
        return Unsupported(place, f"{NAMES[device]} yet: use implementation='chunked'", None)
    passes = importlib.import_module(path)
    reason = passes.unsupported_reason(**call)
    if reason is not None:
        return Unsupported(place, f"this call: {reason}; use implementation='chunked'", reason)
    return Kernel(place, passes, target.interpreting())
