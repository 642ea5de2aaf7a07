"""What ``make aot`` found, as the tables of docs/kernels.md."""

import json
from pathlib import Path

from seqmodels.data import atomic

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "aot.json"
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- table: python -m tools.aot -->", "<!-- end of table -->"


def page(results: dict) -> str:
    """docs/kernels.md as it should be."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{tables(results)}\n{END}{after}"


def write(results: dict) -> None:
    atomic.write_text(PAGE, page(results))


def tables(results: dict) -> str:
    found = results["results"]
    kernels = [(result, kernel) for result in found if result.get("kind") == "op" for kernel in result.get("kernels") or []]
    on_gpu = [pair for pair in kernels if pair[0]["chip"] == "sm_90a"]
    on_tpu = [pair for pair in kernels if pair[0]["chip"] != "sm_90a"]
    steps = [result for result in found if result.get("kind") == "step"]
    lacking = [f"- {result['case']}, {result['chip']}: {result['lacks']}" for result in found if "lacks" in result]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n\n".join([
        f"Compiled {results['date']} with {versions}; {results['cores']} CPU cores, no TPU and no GPU.",
        *([tpu_kernels(on_tpu)] if on_tpu else []),
        *([gpu_kernels(on_gpu)] if on_gpu else []),
        *([training_steps(steps)] if steps else []),
        *(["No kernel:", "\n".join(lacking)] if lacking else []),
    ])  # fmt: skip


def tpu_kernels(pairs: list[tuple[dict, dict]]) -> str:
    return table(
        "op, forward and backward | kernel | chip | GFLOP | VMEM, KiB | bundles in the loop | in the matrix unit "
        "| spilled vectors | CPU seconds",
        [
            [
                result["case"], kernel["name"], result["chip"], gflop(kernel["flops"]),
                kib(kernel["memory_bytes"]), number(kernel["bundles"]), number(kernel["matrix_instructions"]),
                number(kernel["spills"]), f"{result['seconds']:.1f}",
            ]
            for result, kernel in pairs
        ],
    )  # fmt: skip


def gpu_kernels(pairs: list[tuple[dict, dict]]) -> str:
    return table(
        "op, forward and backward | kernel | GFLOP | registers | spilled bytes | shared memory, KiB | wgmma | CPU seconds",
        [
            [
                result["case"], kernel["name"], gflop(kernel["flops"]), number(kernel["registers"]),
                number(kernel["spills"]), kib(kernel["memory_bytes"]), number(kernel["matrix_instructions"]),
                f"{result['seconds']:.1f}",
            ]
            for result, kernel in pairs
        ],
    )  # fmt: skip


def training_steps(results: list[dict]) -> str:
    return table(
        "training step of | chip | ops | kernels | arguments, GiB | temporaries, GiB | CPU seconds",
        [
            [
                f"`{result['case']}`", result["chip"], "; ".join(result["choices"]), number(result["num_kernels"]),
                gib(result["argument_bytes"]), gib(result["temp_bytes"]), f"{result['seconds']:.1f}",
            ]
            for result in results
        ],
    )  # fmt: skip


def table(head: str, rows: list[list[str]]) -> str:
    columns = head.count("|") + 1
    return "\n".join([f"| {head} |", "|" + "---|" * columns, *(f"| {' | '.join(row)} |" for row in rows)])


def number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def gflop(flops: float) -> str:
    return f"{flops / 1e9:.1f}" if flops else ""


def kib(size: int) -> str:
    return f"{size / 2**10:,.0f}"


def gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


if __name__ == "__main__":
    write(json.loads(RESULTS.read_text(encoding="utf-8")))
