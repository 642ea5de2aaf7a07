"""Compiles every kernel and three whole training steps for chips that need not be there, and reads what came out.

    make aot                       # in its own environment: python -m tools.aot
    python -m tools.aot --chips=v6e --cases="decay per channel,gla" --out=aot.json
    python -m tools.aot --chips=sm_90a --cases="delta rule" --update      # of the recorded results these alone

For TPU v5e and v6e with libtpu's compiler, for an H200 (sm_90a) with XLA's and ptxas. That something compiles says
neither that it is right (the tests do, in interpreters) nor how fast it is (only the hardware does).

Writes registers, spills, on-chip memory, matrix instructions and floating point operations of each kernel to
benchmarks/results/aot.json, and the tables of docs/kernels.md. Fails if anything does not compile, if a kernel that
should be there is not, or if one goes beyond the bounds in this file.
"""

import argparse
import concurrent.futures
import importlib.metadata
import json
import os
import platform
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.timing import names_out_of
from seqmodels import command_line, ranges
from seqmodels.circumstances import num_cores
from seqmodels.data import atomic
from seqmodels.errors import UserError
from seqmodels.training import topologies
from tools.aot.cases import CASES, CHIPS, STEPS
from tools.pages import kernels as page

ROOT = Path(__file__).resolve().parents[2]

OUT = ROOT / "benchmarks" / "results" / "aot.json"
NEEDS = {"jax": "0.11.2", "libtpu": None, "jax-cuda13-plugin": "0.11.2", "jax-cuda13-pjrt": "0.11.2"}

# What a kernel may spill on a TPU (on a GPU its case says): vector registers to VMEM, for each instruction of the loop, which has room
# for one store (the most so far: 0.74, the gradient of a decay per channel).
MOST_SPILLS_PER_BUNDLE = 0.75


def main() -> None:
    parser = command_line.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", type=names_out_of("chip", CHIPS), default=tuple(CHIPS), help=", ".join(CHIPS))
    names = (*CASES, *STEPS)
    parser.add_argument("--cases", type=names_out_of("case", names), default=names, help="which kernels and steps; default: all")
    parser.add_argument("--out", type=command_line.output_file, help=f"default: {OUT.relative_to(ROOT)}, if all is compiled")
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="a compiler that has not ended by then will not: search for layouts may"
    )
    parser.add_value("--jobs", ranges.Jobs, default=num_cores(), help="compilers that run side by side")
    parser.add_argument(
        "--update", action="store_true", help=f"write these cases into {OUT.relative_to(ROOT)}, beside the others"
    )
    options = parser.parse_args()
    complete = set(options.cases) == set(names) and set(options.chips) == set(CHIPS)
    results = about() | {"results": compile_all(options)}
    faults = [fault for result in results["results"] for fault in find_faults(result)]
    if options.update:
        results = updated(json.loads(OUT.read_text(encoding="utf-8")), results)
    out = OUT if (complete or options.update) and options.out is None else options.out
    if out is not None:
        atomic.write_text(out, json.dumps(results, indent=1) + "\n")
    if out == OUT:
        page.write(results)
    print(page.tables(results))
    print(f"{len(results['results'])} compiled, {len(faults)} faults")
    if faults:
        raise UserError("\n  ".join(["what is compiled is not as it should be:", *faults]))


def updated(recorded: dict, results: dict) -> dict:
    """The recorded results with these in their places, in the order of the cases; the date and versions are the newer ones'."""
    place = {(result["case"], result["chip"]): result for found in (recorded, results) for result in found["results"]}
    order = [(name, chip) for name in (*CASES, *STEPS) for chip in CHIPS]
    return results | {"results": [place[where] for where in order if where in place]}


def about() -> dict:
    """What compiled it. Raises UserError where the compilers are missing."""
    versions = {"python": platform.python_version()}
    for name, needed in NEEDS.items():
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(f"{name} is not installed here; `make aot` makes an environment that has it") from error
        if needed not in (None, versions[name]):
            raise UserError(f"{name} is {versions[name]}, not {needed}; `make aot` makes an environment that has it")
    return {"versions": versions, "cores": num_cores(), "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}


# ---- compiling, in processes of their own: a compiler that crashes or never ends costs one case


def compile_all(options: argparse.Namespace) -> list[dict]:
    """A dict for every case and chip (see ``compile.py``), in the order of the cases."""
    names = (*CASES, *STEPS)
    jobs = []
    for chip in options.chips:
        # Steps first: they take longest. Kernels apart from them: a step's reports would be thousands of files.
        jobs += [(chip, [name for name in options.cases if name in kind]) for kind in (STEPS, CASES)]
    jobs = sorted((job for job in jobs if job[1]), key=lambda job: job[1][0] in CASES)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        results = [result for found in pool.map(lambda job: compile_job(*job, options.seconds), jobs) for result in found]
    return sorted(results, key=lambda result: (names.index(result["case"]), options.chips.index(result["chip"])))


def compile_job(chip: str, cases: list[str], seconds: float) -> list[dict]:
    """The cases on one chip, one after the other, by as many processes as it takes."""
    results, left = [], list(cases)
    while left:
        for result in run_worker(chip, list(left), seconds):
            left.remove(result["case"])
            results.append({"chip": chip} | result)
            outcome = result.get("error") or result.get("lacks") or f"{result['seconds']:.1f} CPU seconds"
            print(f"{chip}, {result['case']}: {outcome}", file=sys.stderr, flush=True)
    return results


def run_worker(chip: str, cases: list[str], seconds: float) -> Iterator[dict]:
    """The results of one process, as they come; the case at which it ended before its time has an error."""
    with tempfile.TemporaryDirectory(prefix="seqmodels-aot-") as folder:
        reports = Path(folder) / "reports"
        reports.mkdir()
        command = [sys.executable, "-m", "tools.aot.compile", chip, str(reports), *cases]
        with open(Path(folder) / "stderr", "w+") as errors:
            child = subprocess.Popen(
                command, env=environment(str(reports), cases), stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT
            )
            lines = queue.SimpleQueue()

            def read():
                for line in child.stdout:
                    lines.put(line)
                lines.put(None)

            threading.Thread(target=read, daemon=True).start()
            done, begun = 0, None
            try:
                while (line := lines.get(timeout=seconds)) is not None:
                    said = json.loads(line)
                    begun = said["case"] if len(said) == 1 else None
                    if begun is None:
                        done += 1
                        yield said
            except queue.Empty:
                errors.write(f"did not end within {seconds:.0f} s")
            finally:
                child.kill()
                child.wait()
            if done < len(cases):
                errors.seek(0)
                last = " ".join(errors.read().split())[-500:]
                yield {"case": begun or cases[done], "error": f"the compiler ended: {last}"}


def environment(folder: str, cases: list[str]) -> dict[str, str]:
    """What makes the compilers run without hardware, and write their reports on kernels into the folder."""
    variables = {
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_TO": folder,
    }
    if cases[0] in CASES:
        variables["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_(hlo|bundles).*"
        )
    return os.environ | topologies.environment("tpu") | topologies.environment("cuda") | variables


# ---- judging


def find_faults(result: dict) -> list[str]:
    """What is wrong with one result, a line each."""
    chip, name = CHIPS[result["chip"]], f"{result['case']} on {result['chip']}"
    if "error" in result:
        return [f"{name}: {result['error']}"]
    case = CASES.get(result["case"])
    if case is None:
        return [] if result["num_kernels"] else [f"the step of {name}: compiled without a kernel"]
    if "lacks" in result:
        return [f"{name}: there should be a kernel, but: {result['lacks']}"] if chip.device in case.devices else []
    faults = [] if result["kernels"] else [f"{name}: compiled without a kernel"]
    for kernel in result["kernels"]:
        which = f"{name}, {kernel['name']}"
        if kernel["memory_bytes"] > chip.memory_bytes:
            faults.append(f"{which}: {kernel['memory_bytes']:,} bytes on chip, of {chip.memory_bytes:,}")
        bound = case.spilled_bytes if chip.device == "gpu" else int(MOST_SPILLS_PER_BUNDLE * kernel["bundles"])
        if kernel["spills"] > bound:
            faults.append(f"{which}: spills {kernel['spills']}, at most {bound}")
        if case.matrix_products and kernel["flops"] and not kernel["matrix_instructions"]:
            faults.append(f"{which}: no instruction of the matrix unit")
    return faults


if __name__ == "__main__":
    command_line.run(main)
