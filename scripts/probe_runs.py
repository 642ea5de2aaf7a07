"""What known_truths.py and mqar_sweep.py share: runs on synthetic tasks, one after the other, and what they came to."""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmark_shared import about_this_run, write_results

from seqmodels.errors import UserError
from seqmodels.run import load_run

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Probe:
    """One run: a config, and flags of train.py that change it."""

    config: str  # configs/FILE.py:SETTING
    flags: tuple[str, ...]

    def with_(self, *flags: str) -> "Probe":
        """The same with further flags."""
        return Probe(self.config, (*self.flags, *flags))

    @property
    def command(self) -> str:
        """For a person to run it again."""
        return " ".join(["python train.py", f"--config={self.config}", *(_quoted(flag) for flag in self.flags)])


def run_all(
    probes: Mapping[str, Probe], workdir: Path, results: dict, out: Path, after_each: Callable[[dict], None]
) -> None:
    """Train what is not trained, score it into ``results["rows"]``, and write the results after each run.

    Args:
      after_each: draws what there is so far, and adds to the results before they are written.

    Raises:
        UserError: train.py ended with a mistake; the same command goes on from there.
    """
    results["about"] = about_this_run()
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
        "parameters": run.setup.num_parameters,
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
