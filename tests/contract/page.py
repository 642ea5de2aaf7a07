"""docs/equivalence.md: written by tools/pages/equivalence.py, read by the tests that hold it to what they measure."""

import pathlib
import re

from tests.contract.cases import all_cases
from tests.contract.laws import LAWS, Case

PATH = pathlib.Path(__file__).resolve().parents[2] / "docs" / "equivalence.md"
FACTOR, FLOOR = 10.0, 2e-6  # a figure is current within this factor, and within rounding of a few units in the last place
UNOPTIMISED_FACTOR = 100.0  # of programs that the compiler did not optimise, which round elsewhere (rwkv6's strong decays: 44)
Key = tuple[str, str]  # name of the case (mixer and variant), implementation ("default" for None)
Row = tuple[float, ...] | str  # worst error in every law, or why there is no such implementation
# One mixer for each kind of kernel (the selective scan's takes too long): `make test-tools` measures their rows of `pallas` again,
# `make test-all` those of all.
KERNELS_IN_TEST_TOOLS = ("deltanet-default", "gated_retention-default", "hgrn-default")

HEADER = """# Every form is the same mixer: the equivalence matrix

Made by `python -m tools.pages.equivalence`; `make test-all` measures all of it again and fails when it differs. `make test` measures
the rows `recurrent` and `default` of every mixer again, and of the other rows the values and gradients at one length. With options
`make test-tools` measures the row `default`. The rows
called `pallas` are the TPU's kernels in their interpreter: `make test-tools` measures those of {kernels}.

Each mixer of `seqmodels/mixers`, in each implementation, against each law of the contract (`tests/contract/laws.py`): the worst
relative error seen, on three rows of up to 49 tokens (63 before December 2026) at width 32, on a CPU in float32 (0 is exactly
zero). `default` is what a config gets that names no implementation. A form that a mixer does not have is
refused with the reason given below its table.

| law | bound | what it says |
|---|---|---|
{laws}
"""


def key(case: Case) -> Key:
    return case.name, case.implementation or "default"


def write(rows: dict[Key, Row]) -> None:
    """Replaces the page; rows come in the order of the cases."""
    laws = "\n".join(f"| {law.name} | {_figure(law.bound)} | {law.statement} |" for law in LAWS)
    kernels = ", ".join(f"`{name}`" for name in KERNELS_IN_TEST_TOOLS)
    lines = [HEADER.format(laws=laws, kernels=kernels)]
    keys = [key(case) for case in all_cases() if key(case) in rows]
    for name in dict.fromkeys(name for name, _ in keys):
        lines += [
            f"## {name}\n",
            f"| implementation | {' | '.join(law.name for law in LAWS)} |",
            "|---" * (1 + len(LAWS)) + "|",
        ]
        refusals = []
        for row_key in keys:
            if row_key[0] != name:
                continue
            row = rows[row_key]
            if isinstance(row, str):
                refusals.append(f"- `{row_key[1]}`: {' '.join(row.split())}")
            else:
                lines.append(f"| {row_key[1]} | {' | '.join(map(_figure, row))} |")
        lines += ["", *refusals, ""]
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def read() -> dict[Key, Row]:
    """The rows of the page, figures as rounded there."""
    rows, name = {}, None
    for line in PATH.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            name = line.removeprefix("## ")
        elif name and (refusal := re.fullmatch(r"- `(\w+)`: (.*)", line)):
            rows[name, refusal[1]] = refusal[2]
        elif name and line.startswith("| ") and not line.startswith("| implementation"):
            implementation, *figures = (cell.strip() for cell in line.strip("|").split("|"))
            rows[name, implementation] = tuple(map(float, figures))
    return rows


def is_current(figure: float, measured: float, factor: float = FACTOR) -> bool:
    """Whether a figure of the page is what was measured now, but for the rounding of another machine or compilation."""
    return figure <= factor * measured + FLOOR and measured <= factor * figure + FLOOR


def _figure(error: float) -> str:
    return "0" if error == 0.0 else f"{error:.1e}"
