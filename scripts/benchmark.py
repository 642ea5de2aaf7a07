"""How fast this is on this machine, and where the time goes.

    python scripts/benchmark.py --suite=train [--out=benchmarks/results/NAME.json] [--mixers=attention,linear_attention]
    python scripts/benchmark.py --suite=ops   [--out=benchmarks/results/NAME.json] [--ops=channel_decay,selective_scan]
    python scripts/benchmark.py --suite=decode [--out=benchmarks/results/NAME.json] [--contexts=256,2048]
    python scripts/benchmark.py --suite=hf    [--out=benchmarks/results/NAME.json]
    python scripts/benchmark.py --suite=parity [--out=benchmarks/results/NAME.json] [--models=llama,mamba2]
    python scripts/benchmark.py --suite=kernels [--out=benchmarks/results/NAME.json] ["--ops=delta rule"] [--contenders=pallas,peer]
    python scripts/benchmark.py --suite=gpu --carry=FOLDER [--out=benchmarks/results/NAME.json] [--minutes=30]
    python scripts/benchmark.py --suite=models [--out=benchmarks/results/NAME.json] [--mixers=gla] [--minutes=9]
    python scripts/benchmark.py --suite=meshes [--out=benchmarks/results/NAME.json] [--mixers=gla] [--meshes=fsdp]

train: the training step of every mixer (against a PyTorch Transformer of the same shape, in the same process, if
PyTorch is installed): the host's time per step, compile time, tokens per second, the parts of the step one by one, and
the memory of the loss at a large vocabulary.
ops: every recurrence in every form: time, compile time and peak memory of values and gradients, how the time grows
with the length, the stated goals with their verdicts, and a picture beside --out.
decode: what a token costs to write as the context grows, for every mixer, with a picture beside --out.
hf: the training step of Mamba and Mamba-2 against Hugging Face's models of the same sizes in PyTorch (pip install
torch transformers).
kernels: for a GPU or a TPU: the recurrences at sizes of large models, our Pallas kernels beside our chunked form,
flash-linear-attention's kernels and the roofline.
gpu: what the first half hour of an NVIDIA GPU is for, by rank: the kernels against float64, run to run, their headline gradients and
where the time goes, other libraries, a training step, small shapes, decoding, tests. --rehearse goes through it on any machine.
parity: Llama, Mamba, Mamba-2 and xLSTM of transformers and three layers of flash-linear-attention, trained beside ours on the same
batches: the largest difference of the loss (pip install torch transformers flash-linear-attention triton).
models: training and decoding of whole models of 15 and 130 million parameters, every mixer, for a GPU or a TPU.
starts: the same models trained from different starts, every mixer and none: loss, loss after one token of context, and what
the untrained model does to the residual stream.
meshes: the training step of every mixer compiled for meshes of eight devices: what one device computes, holds and sends.

The table goes to stdout, progress to stderr. Contenders take turns, and the fastest turn of each counts: other work on
the machine only ever adds time. CPU time (of all threads) is reported beside wall time for the same reason.
"""

if __name__ == "__main__":  # ahead of the other imports: it may start the process again, and they take seconds
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone, uninstalled, in any directory
    from seqmodels.huge_pages import restart_with_huge_pages
    from seqmodels.packages import check_packages

    check_packages()
    restart_with_huge_pages()

import argparse
import os
from pathlib import Path

import jax

from benchmarks.suites import decode, gpu, hf, kernels, meshes, models, ops, parity, starts, train
from benchmarks.timing import circumstances_of_run, write_results
from seqmodels import command_line, suggest
from seqmodels.errors import UserError

SUITES = {
    "ops": ops, "train": train, "decode": decode, "hf": hf,
    "kernels": kernels, "models": models, "parity": parity, "starts": starts, "meshes": meshes, "gpu": gpu,
}  # fmt: skip


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are shown, and the description keeps its lines."""


def main() -> None:
    options = parse_flags()
    # PyTorch, where it is compared with, needs room on the same device; read when JAX first looks for devices.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # A program from the persistent cache would not show what compiling takes.
    jax.config.update("jax_enable_compilation_cache", False)
    results = circumstances_of_run() | SUITES[options.suite].run(options)
    results["machine"]["load_after"] = os.getloadavg()[0]
    write_results(options.out, results)


def parse_flags() -> argparse.Namespace:
    """The flags of the suite that is asked for, and no other's: a flag that would change nothing is a mistake."""
    choice = command_line.Parser(add_help=False)
    choice.add_argument("--suite")
    choice.add_argument("--help", dest="help_of", nargs="?")
    found = choice.parse_known_args()[0]
    suite = found.suite or found.help_of
    if suite is not None and suite not in SUITES:
        raise UserError(f"there is no suite {suite!r}; {suggest.hint(suite, SUITES)}known: {', '.join(SUITES)}")

    parser = command_line.Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--suite", required=True, help=f"what to measure: {', '.join(SUITES)}; --suite=NAME --help lists its flags"
    )
    parser.add_argument("--out", type=command_line.output_file, help="also write everything to this file, as JSON")
    if suite is not None:
        SUITES[suite].add_flags(parser.add_argument_group(f"--suite={suite}"))
    return parser.parse_args(["--help"] if found.help_of else None)


if __name__ == "__main__":
    command_line.run(main)
