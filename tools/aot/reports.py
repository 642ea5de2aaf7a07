"""What the compilers of TPUs and GPUs write about the kernels they compiled, as numbers."""

import re
from collections import defaultdict
from pathlib import Path

from seqmodels.training.flops import Kernel

# Columns of a TPU's instructions, as libtpu's report names them.
MATRIX, SPILL = "MXU", "VSTORE:SPILL"
UNNAMED = "body"  # a kernel's function where an op has one of a kind


def of_tpu(program: str, folder: Path, known: list[Kernel]) -> list[dict]:
    """The kernels of a compiled program: its HLO, and the folder that libtpu has written the last of its passes to."""
    left, found = list(known), []
    for call in re.finditer(r'%(\S+) = [^\n]*custom_call_target="tpu_custom_call"', program):
        rest = program[call.end() :].split("\n  %", 1)[0]
        name, backward = re.sub(r"\.\d+$", "", call[1]), "transpose(" in re.search(r'op_name="([^"]*)"', rest)[1]
        same_way = [kernel for kernel in left if kernel.backward == backward]
        kernel = next((kernel for kernel in same_way if kernel.name == name), same_way[0])
        left.remove(kernel)
        used = re.search(r'"used_scoped_memory_configs":\[([^\]]*)\]', rest)[1]
        units = _units(_report(folder, call[1], "final_hlo-static-per-bundle-utilization"))
        found.append(
            {
                "name": name if kernel.name == name else _title(kernel),
                "flops": kernel.flops,
                "memory_bytes": sum(int(size) for size in re.findall(r'"size":"(\d+)"', used)),
                "bundles": _loop(_report(folder, call[1], "final_bundles")),
                "matrix_instructions": units[MATRIX],
                "spills": units[SPILL],
            }
        )
    return found


def _report(folder: Path, name: str, what: str) -> list[str]:
    (path,) = [path for path in folder.glob(f"*-{name}-*-{what}.txt") if "schedule-analysis" not in path.name]
    return path.read_text().splitlines()


def _units(report: list[str]) -> dict[str, int]:
    """How often each unit is used, counted over the program's instructions."""
    start = next(i for i, line in enumerate(report) if line.startswith("== UTIL"))
    names = [name.strip() for name in report[1].split(",")]
    rows = [[int(number) for number in line.split()] for line in report[start + 1 :] if line.strip()]
    return dict(zip(names, map(sum, zip(*rows)), strict=True))


def _loop(report: list[str]) -> int:
    """Instructions from the start of the outermost loop's body to the end: what one place of the grid takes."""
    places = [(int(m[1], 16), m[2]) for line in report if (m := re.match(r"\s*(0x[0-9a-f]+|0)\s+(\w\w)?:?", line))]
    first = next((place for place, mark in places if mark == "LB"), 0)
    return places[-1][0] + 1 - first


def of_gpu(folder: Path, known: list[Kernel]) -> list[dict]:
    """The kernels that Mosaic has compiled since the folder was empty, in the order of the program."""
    in_order = defaultdict(list)
    for kernel in known:
        in_order[kernel.name].append(kernel)
    found = []
    for path in sorted(folder.glob("*.ptxas"), key=lambda path: int(path.stem.rpartition("_")[2])):
        name = path.stem.rpartition("_")[0]  # what follows counts the kernels of that name in this process
        kernel = in_order[name].pop(0)
        said = path.read_text()
        found.append(
            {
                "name": _title(kernel) if name == UNNAMED else f"{_title(kernel)}: {name.replace('_', ' ')}",
                "flops": kernel.flops,
                "memory_bytes": int(re.search(r"smem_scratch_bytes=(\d+)", path.with_suffix(".resources.txt").read_text())[1]),
                "registers": int(re.search(r"Used (\d+) registers", said)[1]),
                "spills": sum(map(int, re.search(r"frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said).groups())),
                "matrix_instructions": path.with_suffix(".ptx").read_text().count("wgmma.mma_async"),
            }
        )
    return found


def _title(kernel: Kernel) -> str:
    return "backward" if kernel.backward else "forward"
