"""What a figure means nothing without: the command, the commit, the date, the versions, the machine."""

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from seqmodels import packages

# By the names under which they are recorded.
PACKAGES = {name: name for name in ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "triton")}
PACKAGES["fla"] = "flash-linear-attention"


def circumstances() -> dict:
    """Those of this process, but for its devices: JSON values."""
    installed = {name: importlib.metadata.version(found) for name, found in PACKAGES.items() if importlib.util.find_spec(name)}
    return {
        "command": packages.shell_command(sys.argv),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "versions": {"python": platform.python_version()} | installed,
        "machine": {
            "processor": processor_name(),
            "cores": num_cores(),
            "huge_pages": "hugetlb=1" in os.environ.get("GLIBC_TUNABLES", ""),
            "load_before": os.getloadavg()[0],
        },
    }


def commit(clone: Path = packages.CLONE) -> str:
    """Of the code that runs, with "-dirty" where files were changed, or added in seqmodels/ or configs/; "" where it is not known."""
    if not (clone / ".git").exists():
        return _installed_commit()
    git = functools.partial(subprocess.run, cwd=clone, capture_output=True, text=True)
    described = git(["git", "describe", "--always", "--dirty", "--abbrev=12"]).stdout.strip()
    added = git(["git", "ls-files", "--others", "--exclude-standard", "--", "seqmodels", "configs"]).stdout.strip()
    return f"{described}-dirty" if added and described and not described.endswith("-dirty") else described


def _installed_commit() -> str:
    """What pip recorded of ``pip install git+...`` (PEP 610)."""
    try:
        recorded = importlib.metadata.distribution("seqmodels").read_text("direct_url.json")
        return json.loads(recorded or "{}")["vcs_info"]["commit_id"][:12]
    except (importlib.metadata.PackageNotFoundError, KeyError, ValueError):
        return ""


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


def processor_name() -> str:
    """The processor's, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
