"""How many bytes a device has, so that what cannot fit is refused before it is allocated."""

import os
from collections.abc import Sequence
from pathlib import Path

import jax

from seqmodels.errors import UserError


def available(devices: Sequence[jax.Device]) -> int | None:
    """Bytes of one of these devices; of CPU devices, their share of the host's memory. None where that is not known."""
    ours = [device for device in devices if device.process_index == jax.process_index()]
    device = ours[0]
    if device.platform == "cpu":
        host = host_memory()
        return None if host is None else host // len(ours)
    statistics = device.memory_stats()
    return None if not statistics or "bytes_limit" not in statistics else statistics["bytes_limit"]


def check(needed: int, devices: Sequence[jax.Device], wanted: str, instead: str) -> None:
    """Raises UserError where one of these devices has fewer bytes than ``needed``, before they are asked for.

    Args:
        wanted: what needs them, with its verb.
        instead: what to do.
    """
    there = available(devices)
    if there is not None and needed > there:
        raise UserError(f"{wanted} {gib(needed)} on a device that has {gib(there)}: {instead}")


def host_memory() -> int | None:
    """Bytes that this process may have: the machine's, or its control group's where that is less."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            found = min(found, int(text))
    return found


def gib(size: int) -> str:
    """Bytes for a person."""
    return f"{size / 2**30:,.3g} GiB" if size < 2**50 else f"{size / 2**30:,.0f} GiB"
