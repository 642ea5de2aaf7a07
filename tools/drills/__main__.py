"""Drills that anyone can run: what was tried, what held, what failed.

    make drills                 the quick part, some minutes
    make drills LONG=1          many more trials of each; hours on two cores
    python -m tools.drills --only=kill_training,full_disk [--long] [--seed=0]

What fails is printed as one line each, with the seed that repeats it; the exit status is then 1. Results go to
benchmarks/results/drills.json (quick and long part apart, the newest of each drill), the table to docs/reliability.md.
"""

import argparse
import json
import random
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

from seqmodels import command_line
from seqmodels.circumstances import circumstances
from seqmodels.data import atomic
from seqmodels.errors import UserError
from tools.drills import disks, files, interruptions, long_runs, values
from tools.drills.trials import Count, Place

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "benchmarks" / "results" / "drills.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- drills: this table is written by python -m tools.drills -->\n", "<!-- end of drills -->\n"

DRILLS = {
    drill.__name__: drill
    for drill in (
        files.hostile_files, files.damaged_token_caches, files.damaged_runs,
        interruptions.kill_training, interruptions.stop_training, interruptions.kill_on_mesh, interruptions.kill_tokenising,
        interruptions.kill_evaluating, interruptions.kill_comparing,
        disks.full_disk, disks.small_files, disks.read_only_disk, disks.no_home,
        values.odd_values_built, values.odd_values_trained, long_runs.many_steps, long_runs.host_time,
        long_runs.many_tokens,
    )
}  # fmt: skip


def main() -> None:
    parser = command_line.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help="the long part")
    parser.add_argument("--only", default=",".join(DRILLS), help="names of drills, commas between them")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, bytes and values (default 0)")
    parser.add_argument("--keep_results", action="store_true", help="leave the results and the page as they are")
    options = parser.parse_args()
    names = options.only.split(",")
    for name in names:
        if name not in DRILLS:
            raise UserError(f"--only={name} is no drill; there are {', '.join(DRILLS)}")
    folder = Path(tempfile.mkdtemp(prefix="seqmodels-drills-"))
    failed = 0
    try:
        for name in names:
            place = Place(folder, options.long, random.Random(f"{options.seed} {name}"))
            before, begun = cpu_seconds(), time.monotonic()
            count = DRILLS[name](place)
            row = {
                "tried": count.tried, "held": count.held, "failed": count.failures, "left_out": count.left_out,
                "cpu_seconds": round(cpu_seconds() - before, 1), "seconds": round(time.monotonic() - begun, 1),
                "seed": options.seed,
            }  # fmt: skip
            failed += len(count.failures)
            report(name, count, row)
            if not options.keep_results:
                record(name, "long" if options.long else "quick", row)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if failed:
        sys.exit(1)


def cpu_seconds() -> float:
    return sum(
        used.ru_utime + used.ru_stime for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def report(name: str, count: Count, row: dict) -> None:
    note = f"  ({count.left_out})" if count.left_out else ""
    print(f"{name:22} {count.tried:6} tried {count.held:6} held {len(count.failures):4} failed {row['cpu_seconds']:8.1f} s{note}")
    for failure in count.failures:
        print(f"  {failure}")
    sys.stdout.flush()


def record(name: str, part: str, row: dict) -> None:
    """One drill's result, in place of its last one."""
    results = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    rows = results.setdefault(part, {})
    rows[name] = row | {key: value for key, value in circumstances().items() if key != "command"}
    results[part] = {each: rows[each] for each in DRILLS if each in rows}
    atomic.write_text(OUT, json.dumps(results, indent=1) + "\n")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    atomic.write_text(PAGE, before + BEGIN + table(results) + END + rest.partition(END)[2])


def table(results: dict) -> str:
    """Tried, held and failed of the quick and of the long part, and which of them have not been run."""
    lines = [
        "| drill | what must hold | part | tried | held | failed | CPU seconds | measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    absent: dict[str, list[str]] = {"quick": [], "long": []}
    for name, drill in DRILLS.items():
        for part in ("quick", "long"):
            if name not in (results[part] if part in results else ()):
                absent[part].append(name)
            else:
                row = results[part][name]
                note = f" ({row['left_out']})" if row["left_out"] else ""
                what = " ".join(drill.__doc__.split())
                lines.append(
                    f"| `{name}` | {what} | {part} | {row['tried']:,}{note} | {row['held']:,} | {len(row['failed']):,} | "
                    f"{row['cpu_seconds']:,.0f} | {row['date'][:10]} |"
                )
    for part, names in absent.items():
        if names:
            lines += ["", f"Not run yet, {part} part: {', '.join(f'`{name}`' for name in names)}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command_line.run(main)
