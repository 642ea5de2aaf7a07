"""Does this code find what is known about mixers? Small runs on synthetic tasks, each with what must come out.

    python -m tools.known_truths [--out=benchmarks/results/known_truths.json] [--runs=parity_lstm,parity_mamba]

1. Two layers of attention solve associative recall of 4 pairs (Arora et al. 2023, arXiv:2312.04927).
2. Linear attention with a short convolution, whose state is fixed, recalls fewer of more pairs, fewer than attention, and
   more where its state is larger (Arora et al. 2024, arXiv:2402.18668), at the size of configs/recall.py:mqar_sweep.
3. An LSTM learns the parity of each prefix of 40 tokens, and longer ones with it; attention, and state spaces with
   positive eigenvalues, do not (Merrill et al. 2024, arXiv:2404.08819; Grazzi et al. 2024, arXiv:2411.12537).

A run that has ended is not repeated. The results, and a picture in docs/, are written after each one.
"""

if __name__ == "__main__":  # ahead of the other imports: it may start the process again, and they take seconds
    from seqmodels.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()

import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.timing import circumstances_of_run, write_results
from seqmodels import command_line
from seqmodels.errors import UserError
from seqmodels.run import load_run

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "known_truths.json"
PICTURE = ROOT / "docs" / "known_truths.png"

RECALL = "configs/recall.py:mqar_sweep"
SELDOM = ("--config.train.eval_every_steps=500", "--config.train.checkpoint_every_steps=500")
_PAIRS = (2, 16)  # the fewest and the most of configs/recall.py:mqar_sweep
_PARITY = (
    # With a label on the last token alone an LSTM needs more than the 128,000 examples that a minute has.
    "--config.data.tasks.parity.every=True", "--config.data.tasks.parity.test_lengths=(10,20,40,80)",
    "--config.data.batch_size=64", "--config.model.d_model=32", "--config.train.steps=1000",
    "--config.optim.learning_rate=5e-3", "--config.optim.warmup_steps=100",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Probe:
    """One run: a config, and flags of train.py that change it."""

    config: str  # configs/FILE.py:SETTING
    flags: tuple[str, ...]

    @property
    def command(self) -> str:
        """For a person to run it again."""
        return " ".join(["python train.py", f"--config={self.config}", *(_quoted(flag) for flag in self.flags)])


RUNS = {
    "mqar_small": Probe("configs/recall.py:mqar_small", ()),
    "pairs_attention": Probe(RECALL, SELDOM),
    # The sum of k v^T as it is, with a norm on what is read: 16 heads have a state of 4 x 4 each, 4 heads one of 16 x 16.
    **{
        f"pairs_linear_attention_{heads}_heads": Probe(
            RECALL,
            (
                "--config.model.pattern=linear_attention", f"--config.model.mixers.linear_attention.num_heads={heads}",
                "--config.model.mixers.linear_attention.conv_width=4",
                "--config.model.mixers.linear_attention.feature_map=identity",
                "--config.model.mixers.linear_attention.normalize=False", *SELDOM,
            ),
        )
        for heads in (16, 4)
    },
    **{
        f"parity_{mixer}": Probe(
            "configs/state_tracking.py:parity", (*_PARITY, f"--config.model.pattern={mixer}")
        )
        for mixer in ("lstm", "attention", "mamba")
    },
}  # fmt: skip


def main() -> None:
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "known_truths", help="folder of the run folders")
    parser.add_argument("--out", type=command_line.output_file, default=OUT, help="results file (JSON), read and added to")
    parser.add_argument("--runs", help=f"which of {', '.join(RUNS)}; default all")
    options = parser.parse_args()
    results = read(options.out)
    picture = PICTURE if options.out == OUT else options.out.with_suffix(".png")

    def judge_and_draw(results: dict) -> None:
        results["truths"] = verdicts(results["rows"])
        draw(results["rows"], picture)

    run_all(chosen(options.runs, RUNS), options.workdir, results, options.out, judge_and_draw)
    for truth, holds in verdicts(results["rows"]).items():
        print(f"{'holds' if holds else 'DOES NOT HOLD' if holds is not None else 'not run':>14}  {truth}")


def run_all(probes: Mapping[str, Probe], workdir: Path, results: dict, out: Path, after_each: Callable[[dict], None]) -> None:
    """Train what is not trained, score it into ``results["rows"]``, and write the results after each run.

    Args:
      after_each: draws what there is so far, and adds to the results before they are written.

    Raises:
        UserError: train.py ended with a mistake; the same command goes on from there.
    """
    results["about"] = circumstances_of_run()
    start = time.perf_counter()
    for done, (name, probe) in enumerate(probes.items()):
        left = f", about {(time.perf_counter() - start) / done * (len(probes) - done) / 60:.0f} min left" if done else ""
        print(f"[{done + 1}/{len(probes)}] {name}{left}", file=sys.stderr)
        folder = workdir.absolute() / name.replace(" ", "_")
        command = [sys.executable, "train.py", f"--config={probe.config}", *probe.flags, f"--workdir={folder}"]
        trained = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if trained.returncode:
            raise UserError(f"{name}: train.py ended with status {trained.returncode}; the same command goes on from here")
        summary = json.loads(trained.stdout.splitlines()[-1])
        results["rows"][name] = scored(folder) | {"train_seconds": summary["train_seconds"], "command": probe.command}
        after_each(results)
        write_results(out, results)


def scored(folder: Path) -> dict:
    """What a run came to on its whole test."""
    run = load_run(folder)
    evaluation = run.evaluate()
    return {
        "pattern": run.config.model.pattern,
        "repeats": run.config.model.repeats,
        "d_model": run.config.model.d_model,
        "steps": run.step,
        "parameters": run.trainer.num_parameters,
        "state_bytes": run.state_bytes(),
        "loss": evaluation.loss,
        **evaluation.scores,
    }


def read(out: Path) -> dict:
    """The results so far. Raises UserError where they cannot be written."""
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: there is no folder {out.parent}")
    return json.loads(out.read_text()) if out.exists() else {"rows": {}}


def chosen(names: str | None, known: Mapping[str, Probe]) -> dict[str, Probe]:
    """The runs that a flag names, commas between them; all of them for None."""
    wanted = list(known) if names is None else names.split(",")
    for name in wanted:
        if name not in known:
            raise UserError(f"there is no run {name!r}; known: {', '.join(known)}")
    return {name: known[name] for name in wanted}


def _quoted(flag: str) -> str:
    name, _, value = flag.partition("=")
    return f'{name}="{value}"' if any(character in value for character in " ()") else flag


def verdicts(rows: dict) -> dict[str, bool | None]:
    """Each truth, and whether the runs agree; None where they are not there."""

    def accuracy(name: str, segment: str | None = None) -> float:
        row = rows[name]
        return row["accuracy"] if segment is None else row["accuracy_by_segment"][segment]

    small, large = (f"pairs_linear_attention_{heads}_heads" for heads in (16, 4))
    fewest, most = (f"length 64, {pairs} pairs" for pairs in (_PAIRS[0], _PAIRS[-1]))
    truths = {
        "two layers of attention solve associative recall of 4 pairs": lambda: accuracy("mqar_small") > 0.99,
        # A model that has learnt which tokens are values, and no more, answers one of K questions right.
        "linear attention of a small state recalls few pairs, fewer of more, and fewer than attention": lambda: (
            accuracy(small, fewest) > 0.75
            and accuracy(small, fewest) - accuracy(small, most) > 0.2
            and accuracy("pairs_attention", most) - accuracy(small, most) > 0.2
        ),
        "of a larger state it recalls more": lambda: accuracy(large, most) - accuracy(small, most) > 0.2,
        "an LSTM learns parity to 40 tokens, each prefix labelled": lambda: accuracy("parity_lstm", "length 40") > 0.99,
        "attention does not": lambda: accuracy("parity_attention", "length 40") < 0.75,
        "a state space with positive eigenvalues (Mamba) does not": lambda: accuracy("parity_mamba", "length 40") < 0.75,
        # At chance from token 41 on, the mean over 80 prefixes is at most 0.75.
        "the LSTM goes on to 80 tokens, neither of the two does": lambda: (
            accuracy("parity_lstm", "length 80") > 0.99
            and max(accuracy(f"parity_{mixer}", "length 80") for mixer in ("attention", "mamba")) < 0.75
        ),
    }

    def verdict(holds) -> bool | None:
        try:
            return holds()
        except KeyError:
            return None

    return {truth: verdict(holds) for truth, holds in truths.items()}


def draw(rows: dict, path: Path) -> None:
    """Accuracy against pairs, and against the length of the parity."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, prefix, unit in ((panels[0], "pairs_", "pairs in 64 tokens"), (panels[1], "parity_", "tokens")):
        sizes = []
        for name, row in rows.items():
            if name.startswith(prefix):
                sizes = [int(re.findall(r"\d+", segment)[-1]) for segment in row["accuracy_by_segment"]]
                label = name.removeprefix(prefix).replace("_", " ")
                axes.plot(sizes, list(row["accuracy_by_segment"].values()), marker="o", ms=4, lw=1.8, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, list(map(str, sizes)))
        axes.minorticks_off()
        axes.set_xlabel(unit)
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False)
    panels[0].set_ylabel("accuracy")
    panels[0].set_title("recall: a question for each pair")
    panels[1].set_title("parity, trained to 40 tokens")
    panels[1].axvline(40, color="grey", lw=1.0, ls="--")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    command_line.run(main)
