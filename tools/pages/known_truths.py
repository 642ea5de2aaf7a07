"""Writes the table of docs/tasks.md: what the literature says of mixers, and whether two published comparisons agree.

    python -m tools.pages.known_truths

The comparisons are docs/results/mqar_sweep (associative recall, every mixer with a short convolution) and docs/results/parity; their
reports have the commands that made them. `make test-tools` fails when the table is not what this would write.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

from seqmodels import command_line
from seqmodels.comparison import results
from seqmodels.comparison.report import markdown
from seqmodels.data import atomic
from tools.pages.comparisons import FOLDER
from tools.pages.mixers import ROOT, with_table

PAGE = ROOT / "docs" / "tasks.md"
BEGIN = "<!-- table: python -m tools.pages.known_truths -->"
HEADS = ("statement", "source", "measured", "holds")
# Linear attention without a feature map, in heads of 4 x 4 and of 16 x 16 at width 64.
SMALL_STATE, LARGE_STATE = "linear_attention_16_heads", "linear_attention_4_heads"
FEWEST, FEW, MOST = 2, 4, 16  # pairs of configs/recall.py:mqar_sweep
TRAINED, LONGER = 40, 80  # tokens of configs/state_tracking.py:parity_small
# Right at random from token 41 on, and everywhere before: the mean over 80 prefixes.
AT_RANDOM = 0.75

# Of (mixer, pairs or tokens): top-1 accuracy on the reported examples, the mean over the seeds.
Accuracies = Mapping[tuple[str, int], float]


@dataclasses.dataclass(frozen=True)
class Truth:
    """A statement of the literature, and what it says of accuracies."""

    statement: str
    source: str
    of: tuple[tuple[str, int], ...]  # (mixer, pairs or tokens): what is measured
    holds: Callable[..., bool]  # of these accuracies


RECALL = (
    Truth(
        f"Two layers of attention solve associative recall of {FEW} pairs", "2312.04927", (("attention", FEW),),
        lambda accuracy: accuracy > 0.99,
    ),
    Truth(
        "Linear attention whose state is small recalls few pairs, fewer of more pairs, and fewer than attention", "2402.18668",
        ((SMALL_STATE, FEWEST), (SMALL_STATE, MOST), ("attention", MOST)),
        # A model that has learnt which tokens are values, and no more, answers one of K questions right.
        lambda few, many, attention: few > 0.75 and few - many > 0.2 and attention - many > 0.2,
    ),
    Truth(
        "With a larger state it recalls more", "2402.18668", ((SMALL_STATE, MOST), (LARGE_STATE, MOST)),
        lambda small, large: large - small > 0.2,
    ),
    Truth(
        "The delta rule recalls as many pairs as attention, a sum with a fixed decay (RetNet) does not", "2406.06484",
        (("deltanet", MOST), ("attention", MOST), ("retnet", MOST)),
        lambda delta, attention, retnet: attention - delta < 0.05 and delta - retnet > 0.2,
    ),
)  # fmt: skip
PARITY = (
    Truth(
        f"An LSTM learns the parity of every prefix of {TRAINED} tokens", "2404.08819", (("lstm", TRAINED),),
        lambda accuracy: accuracy > 0.99,
    ),
    Truth("Attention does not", "2404.08819", (("attention", TRAINED),), lambda accuracy: accuracy < AT_RANDOM),
    Truth(
        "A state space with positive eigenvalues (Mamba) does not", "2411.12537", (("mamba", TRAINED),),
        lambda accuracy: accuracy < AT_RANDOM,
    ),
    Truth(
        f"The LSTM goes on to {LONGER} tokens, neither of the two does", "2411.12537",
        (("lstm", LONGER), ("attention", LONGER), ("mamba", LONGER)),
        lambda lstm, *others: lstm > 0.99 and max(others) < AT_RANDOM,
    ),
)  # fmt: skip


def main() -> None:
    command_line.Parser(description=__doc__.splitlines()[0]).parse_args()
    atomic.write_text(PAGE, page())
    print(f"wrote {PAGE.relative_to(ROOT)}")


def page() -> str:
    """docs/tasks.md as it should be."""
    rows = []
    for truths, name, unit in ((RECALL, "mqar_sweep", "pairs"), (PARITY, "parity", "tokens")):
        rows += verdicts(truths, accuracies(results.read(FOLDER / name / "results.json")), unit)
    return with_table(PAGE, BEGIN, "\n".join(markdown.table(HEADS, rows)))


def accuracies(found: Mapping) -> Accuracies:
    """Of a comparison. A segment's name ends with its pairs (``length 64, 2 pairs``) or its tokens (``length 40``)."""
    return {
        (label, int(re.findall(r"\d+", segment)[-1])): accuracy
        for label, row in found["mixers"].items()
        if row["quality"]
        for segment, _, accuracy in row["quality"]["by_segment"]
    }


def verdicts(truths: Sequence[Truth], measured: Accuracies, unit: str) -> list[list[str]]:
    """A row of the table for each statement.

    Raises:
      KeyError: the comparison lacks a mixer or a size that a statement is of.
    """
    rows = []
    for truth in truths:
        values = [measured[key] for key in truth.of]
        in_words = ", ".join(f"{mixer} {value:.3f} of {size} {unit}" for (mixer, size), value in zip(truth.of, values))
        rows.append([truth.statement, f"arXiv {truth.source}", in_words, "yes" if truth.holds(*values) else "no"])
    return rows


if __name__ == "__main__":
    command_line.run(main)
