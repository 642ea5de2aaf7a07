"""`make demo`: softmax attention and linear attention learn the same toy stories; which is better, by how much?

    python scripts/demo.py [--workdir=runs/demo] [--fresh] [--config.any.field=value]

Two ordinary runs of train.py with configs/demo.py, one after the other, then one table, two pictures and a story by
each. What was trained before is found again: a stopped demo goes on, a finished one is shown; --fresh begins anew.
"""

import dataclasses
import json
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a clone, uninstalled, in any directory

if __name__ == "__main__":  # ahead of imports that fail without the packages
    from seqmodels.packages import check_packages

    check_packages()

from seqmodels import command_line
from seqmodels.escape import escape, say
from seqmodels.evaluation import plots
from seqmodels.evaluation.perplexity import Evaluation
from seqmodels.run import Run, load_run
from seqmodels.training import loop
from train import parse

MIXERS = ("attention", "linear_attention")
PROMPT = "Once upon a time"


@dataclasses.dataclass(frozen=True)
class Result:
    """What one of the runs came to."""

    run: Run
    rows: list[dict]  # of its metrics.jsonl
    evaluation: Evaluation
    story: str


def main() -> None:
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "demo", help="default: runs/demo of the clone")
    parser.add_argument("--fresh", action="store_true", help="delete what an earlier demo trained")
    options, overrides = parser.parse_known_args()
    start = time.perf_counter()
    workdirs = {mixer: options.workdir.absolute() / mixer for mixer in MIXERS}
    config, _ = parse(["train.py", *flags_of(MIXERS[0], workdirs[MIXERS[0]], overrides)])
    for number, (mixer, workdir) in enumerate(workdirs.items(), 1):
        if options.fresh:
            shutil.rmtree(workdir, ignore_errors=True)
        print(file=sys.stderr)
        say(f"[{number}/{len(MIXERS)}] {mixer}")
        train(mixer, workdir, overrides)
    command_line.use_compilation_cache(config.train.compilation_cache_dir)
    results = {mixer: read_result(workdir) for mixer, workdir in workdirs.items()}
    curves, positions = options.workdir / "learning_curves.png", options.workdir / "loss_by_position.png"
    plots.learning_curves({mixer: result.rows for mixer, result in results.items()}, curves)
    plots.loss_by_position({mixer: result.evaluation.loss_by_position for mixer, result in results.items()}, positions)
    show(results)
    print()
    say(f"pictures: {curves}", sys.stdout)
    say(f"          {positions}", sys.stdout)
    print(f"the whole demo took {time.perf_counter() - start:.0f} s")


def flags_of(mixer: str, workdir: Path, overrides: list[str]) -> list[str]:
    return [f"--config={ROOT / 'configs' / 'demo.py'}:{mixer}", f"--workdir={workdir}", *overrides]


def train(mixer: str, workdir: Path, overrides: list[str]) -> None:
    """One run of train.py; its progress goes to the terminal. A run that stops or fails ends the demo alike."""
    flags = flags_of(mixer, workdir, overrides)
    with subprocess.Popen([sys.executable, ROOT / "train.py", *flags], stdout=subprocess.DEVNULL) as training:
        # A run that is stopped saves first: wait for it. Ctrl-C reaches it from the terminal, SIGTERM does not.
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: training.terminate())
        status = training.wait()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if status:
        print("the demo ended here; the same command goes on, with --fresh it begins anew", file=sys.stderr)
        sys.exit(status)


def read_result(workdir: Path) -> Result:
    run = load_run(workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return Result(run, rows, run.evaluate(), run.generate(PROMPT, max_tokens=loop.SAMPLE_TOKENS))


def show(results: dict[str, Result]) -> None:
    print(f"\n{'':16}  perplexity  bits per byte  parameters  state bytes  trained tokens/s")
    for mixer, result in results.items():
        speed = statistics.median(row["tokens_per_second"] for row in result.rows if row["split"] == "train")
        say(
            f"{mixer:16}  {result.evaluation.perplexity:10.3f}  {result.evaluation.bits_per_byte:13.3f}"
            f"  {result.run.trainer.num_parameters:10,}  {result.run.state_bytes():11,}  {speed:16,.0f}",
            sys.stdout,
        )
    for mixer, result in results.items():
        print(escape(f"\n{mixer} writes:\n{textwrap.indent(PROMPT + result.story, '  ')}", "terminal"))


if __name__ == "__main__":
    command_line.run(main)
