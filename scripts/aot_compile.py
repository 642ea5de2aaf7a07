"""The worker of aot.py: compiles cases for one chip and writes what came of each as a line of JSON.

    python scripts/aot_compile.py CHIP REPORT_FOLDER CASE [CASE ...]

aot.py starts it with the environment that makes the compilers write their reports, and again where one of them crashes
or never ends. A line ``{"case": ...}`` alone says that a case has begun.
"""

import json
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a clone, uninstalled, in any directory

import aot_reports
import jax
import jax.numpy as jnp
from aot_cases import CASES, CHIPS, PIECES, STEPS, Case, Chip, step_config
from jax.experimental import topologies

from seqmodels import ops
from seqmodels.training import flops
from seqmodels.training.state import Setup


def main(name: str, folder: str, *cases: str) -> None:
    chip = CHIPS[name]
    device = chip_device(chip)
    for case in cases:
        say({"case": case})
        try:
            say({"case": case} | (compile_step(case, device) if case in STEPS else compile_kernels(case, device, Path(folder))))
        except Exception as error:  # a compiler's: its first lines say what it did not like
            traceback.print_exc()
            say({"case": case, "error": " ".join(f"{type(error).__name__}: {error}".split())[:500]})


def say(result: dict) -> None:
    print(json.dumps(result), flush=True)


def chip_device(chip: Chip):
    """A device that can be compiled for and does not exist."""
    if chip.device == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=chip.topology).devices[0]
    description = (ROOT / "scripts" / "h200.textproto").read_text()
    return topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology=chip.topology, target_config=description
    ).devices[0]
