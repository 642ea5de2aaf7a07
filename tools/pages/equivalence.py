"""Writes docs/equivalence.md: every mixer x implementation x law of the contract, with the worst error measured.

    python -m tools.pages.equivalence [--mixers=gla,mamba] [--jobs=2]

The laws and their bounds are those of tests/contract/laws.py, which `make test` holds every mixer to; this prints the
figures. `make test` also fails when the page is not what it measures: a row missing, a refusal that is none, a figure
off by more than a factor of ten. With --mixers the other mixers' rows stay as they are.
"""

import argparse
import concurrent.futures
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path

from seqmodels import command_line, mixers, ranges
from tests.contract import page
from tests.contract.cases import all_cases
from tests.contract.laws import LAWS

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = command_line.Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--mixers", default=",".join(mixers.names()), help="whose rows to measure")
    parser.add_value("--jobs", ranges.Jobs, default=os.cpu_count(), help="processes")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of the processes that measure
    wanted = options.mixers.split(",")
    for name in wanted:
        mixers.load(name)  # raises, naming the nearest
    groups = list(dict.fromkeys(case.name for case in all_cases() if case.name.split("-")[0] in wanted))
    known = {case.name for case in all_cases()}
    old = page.read() if page.PATH.exists() and set(wanted) != set(mixers.names()) else {}
    rows = {key: row for key, row in old.items() if key[0] in known}
    start = time.perf_counter()
    # A new process for every group: compiled programs of one mixer are of no use to the next, and stay in memory.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context, max_tasks_per_child=1) as pool:
        pending = [pool.submit(measure, group) for group in groups]
        for done, finished in enumerate(concurrent.futures.as_completed(pending), 1):
            rows |= finished.result()
            seconds = time.perf_counter() - start
            left = seconds / done * (len(groups) - done)
            print(f"{done}/{len(groups)} variants, {seconds:.0f} s, about {left:.0f} s left", file=sys.stderr)
    page.write(rows)
    print(f"wrote {page.PATH.relative_to(ROOT)}: {len(rows)} rows of {len(LAWS)} laws")
    broken = [
        f"{name} {implementation}: {law.name} {error:.1e}"
        for (name, implementation), row in rows.items()
        if not isinstance(row, str)
        for law, error in zip(LAWS, row)
        if not error <= law.bound
    ]
    if broken:
        print("beyond its bound:\n  " + "\n  ".join(broken), file=sys.stderr)
        sys.exit(1)


def measure(group: str) -> dict[page.Key, page.Row]:
    """The rows of one variant of one mixer."""
    import jax
    from flax import nnx

    from tests.contract import laws

    def errors(case):
        found = []
        for law in LAWS:
            try:
                found.append(law.measure(case))
            except laws.ContractBroken as broken:
                print(f"{case.name} {case.implementation} {law.name}: {broken}", file=sys.stderr)
                found.append(math.inf)
        return tuple(found)

    rows = {}
    with jax.numpy_dtype_promotion("strict"), nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        for case in (case for case in all_cases() if case.name == group):
            reason = laws.refusal(case)
            rows[page.key(case)] = errors(case) if reason is None else reason
    return rows


if __name__ == "__main__":
    command_line.run(main)
