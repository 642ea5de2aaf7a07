"""Every mixer on TinyStories at one small setting: quality, size and speed, each from this one command.

    python scripts/tinystories_table.py --source=PATH/TO/TinyStories --out=benchmarks/results/tinystories_cpu.json

Trains each entry with train.py (a run that is there is continued, or left as it is when it has ended), scores it on the
whole validation split as eval.py does, and then, when nothing else runs, times training steps (in turns) and decoding. The
results file is written after every entry, and entries that are not asked for stay in it. scripts/write_tables.py turns it
into the tables of README.md and docs/mixers.md.

--entries takes names of mixers (their config is configs/tinystories.py:NAME) and "hybrid" (configs/hybrid.py:small);
--phases=quality or --phases=speed runs one half; further --config.FIELD=VALUE flags go to every train.py.
"""

if __name__ == "__main__":  # ahead of the other imports: it may start the process again, and they take seconds
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone, uninstalled, in any directory
    from seqmodels.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

import jax
import numpy as np

from configs import hybrid, tinystories
from seqmodels import command_line, mixers
from seqmodels.config import from_config_dict
from seqmodels.data.atomic import write_whole
from seqmodels.errors import UserError
from seqmodels.evaluation import decode
from seqmodels.run import Run, load_run
from seqmodels.training.state import Setup

HYBRID = "hybrid"
PHASES = ("quality", "speed")
CONTEXTS = (256, 4096)  # tokens at which state bytes are counted


def main() -> None:
    everything = ",".join([*mixers.names(), HYBRID])
    parser = command_line.Parser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--source", help="the data, as config.data.source; default the hub's data set")
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "tinystories", help="folder of the run folders")
    parser.add_argument("--out", type=Path, required=True, help="results file (JSON), read and added to")
    parser.add_argument("--entries", default=everything, help="which rows")
    parser.add_argument("--phases", default=",".join(PHASES), help="what to do")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each training step that is timed")
    options, overrides = parser.parse_known_args()
    unknown = [flag for flag in overrides if not flag.startswith("--config.")]
    if unknown:
        raise UserError(f"{unknown[0]} is not a flag; --help lists them")
    if not options.out.parent.is_dir():
        raise UserError(f"--out={options.out}: there is no folder {options.out.parent}")
    phases = options.phases.split(",")
    for phase in phases:
        if phase not in PHASES:
            raise UserError(f"--phases={phase} does not exist; there is {', '.join(PHASES)}")
    entries = {name: config_of(name) for name in options.entries.split(",")}
    if options.source is not None:
        overrides.append(f"--config.data.source={options.source}")
    results = json.loads(options.out.read_text()) if options.out.exists() else {"rows": {}}
    workdirs = {name: options.workdir.absolute() / name for name in entries}

    if "quality" in phases:
        start = time.perf_counter()
        for done, (name, config) in enumerate(entries.items()):
            left = (time.perf_counter() - start) / done * (len(entries) - done) if done else float("nan")
            print(f"\n[{done + 1}/{len(entries)}] {name}, about {left / 60:.0f} min left", file=sys.stderr)
            command = train(config, workdirs[name], overrides)
            row = quality(load_run(workdirs[name]))
            results["rows"][name] = results["rows"].get(name) or {}
            results["rows"][name] |= row | {"config": config, "command": command}
            save(results, options.out)
    if "speed" in phases:
        for name, measured in speed({name: fresh_setup(name) for name in entries}, options.rounds).items():
            results["rows"].setdefault(name, {}).update(measured)
        save(results, options.out)


def config_of(name: str) -> str:
    """The --config of an entry. Raises UserError for one that does not exist."""
    if name == HYBRID:
        return "configs/hybrid.py:small"
    mixers.load(name)  # raises, naming the nearest
    return f"configs/tinystories.py:{name}"


def save(results: dict, path: Path) -> None:
    from benchmark_shared import about_this_run

    results["about"] = about_this_run()
    write_whole(path, lambda file: file.write((json.dumps(results, indent=1) + "\n").encode()))


def train(config: str, workdir: Path, overrides: list[str]) -> str:
    """Runs train.py to its end; the command, for a person to run again."""
    arguments = ["train.py", f"--config={config}", *overrides]
    status = subprocess.run(
        [sys.executable, *arguments, f"--workdir={workdir}"], cwd=ROOT, stdout=subprocess.DEVNULL
    ).returncode
    if status != 0:
        raise UserError(f"train.py ended with status {status}; the same command goes on from here")
    return " ".join(["python", *arguments])


def quality(run: Run) -> dict:
    """What eval.py says of a run, and its size."""
    evaluation = run.evaluate()
    return {
        "pattern": run.config.model.pattern,
        "repeats": run.config.model.repeats,
        "d_model": run.config.model.d_model,
        "steps": run.step,
        "train_tokens": run.step * run.config.data.batch_size * run.config.data.seq_len,
        "parameters": run.setup.num_parameters,
        "validation_loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
        "bits_per_byte": evaluation.bits_per_byte,
        "validation_tokens": evaluation.tokens,
        "state_bytes": {str(context): run.state_bytes(context) for context in CONTEXTS},
    }


def fresh_setup(name: str) -> Setup:
    """An entry's model and training step as its config has them, with no data: what they cost depends on no weight."""
    config = hybrid.get_config("small") if name == HYBRID else tinystories.get_config(name)
    config.mesh.data = 1
    return Setup(from_config_dict(config), config.data.vocab_size, jax.devices()[:1])


def speed(setups: dict[str, Setup], rounds: int) -> dict[str, dict]:
    """Tokens per second of training steps, taken in turns, and of decoding one text and 32 at once."""
    from benchmark_shared import take_turns

    results, contenders = {name: {} for name in setups}, {}
    for name, setup in setups.items():
        print(f"compiling the training step of {name}", file=sys.stderr)
        contenders[name] = training_step(setup)
    for name, times in take_turns(contenders, rounds).items():
        of = setups[name].config.data
        results[name]["train_tokens_per_second"] = 1e3 * of.batch_size * of.seq_len / times["wall_ms"]
        results[name]["train_step_ms"] = times
    contenders.clear()
    for name, setup in setups.items():
        print(f"decoding with {name}", file=sys.stderr)
        params = setup.init()["params"]
        for batch_size in (1, 32):
            measured = decode.measure(
                setup.graphdef, params, setup.vocab_size,
                batch_size=batch_size, context=256, tokens=128, key=jax.random.key(0),
            )  # fmt: skip
            results[name][f"decode_tokens_per_second_batch_{batch_size}"] = measured.tokens_per_second
    return results


def training_step(setup: Setup):
    """A call that takes one optimizer step from fresh parameters on random tokens, and waits for it."""
    of = setup.config.data
    tokens = np.random.default_rng(0).integers(
        setup.vocab_size, size=(of.batch_size, of.seq_len + 1), dtype=np.int32
    )
    batch = setup.put({"inputs": tokens[:, :-1], "targets": tokens[:, 1:]})
    carried = {"state": setup.init()}

    def step():
        carried["state"], _ = setup.train_step(carried["state"], batch)
        jax.block_until_ready(carried["state"])

    return step


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    command_line.run(main)
