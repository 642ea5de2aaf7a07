"""Pallas kernels, one file per recurrence and device: ``<op>_tpu.py`` and ``<op>_gpu.py`` (Mosaic, for Hopper).

Each file has ``lacks(...)``, which says in a few words what keeps a call from its kernel (None if nothing does), and the
kernel's passes. Nothing else in the project imports Pallas.
"""

import importlib
import importlib.util
import types

from seqmodels.ops import target

NAMES = {"tpu": "a TPU", "gpu": "an NVIDIA GPU"}


def find(op: str) -> types.ModuleType:
    """The kernels of ``op`` for the device that the caller is traced for.

    Raises:
      NotImplementedError: there are none; the message says why.
    """
    device = target.device()
    if device not in NAMES:
        raise NotImplementedError(
            f"{op} has no Pallas kernel for this device ({device}): use implementation='chunked', or "
            "`with seqmodels.ops.interpret():` to run a TPU's or a GPU's kernel in its interpreter"
        )
    name = f"seqmodels.ops.kernels.{op}_{device}"
    if importlib.util.find_spec(name) is None:
        raise NotImplementedError(f"{op} has no Pallas kernel for {NAMES[device]} yet: use implementation='chunked'")
    return importlib.import_module(name)
