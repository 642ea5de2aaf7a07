"""--suite=models: whole models of 15 and 130 million parameters, every mixer: training and decoding, on the device at hand.

Training tokens/s of the median step and the share of the device's peak that is, memory of a step, seconds of a decoded token
after each context, bytes of state. Results are written after each row to --out; what stands there already, of the same
commit and device, is not measured again.
"""

import argparse
import dataclasses

import jax

from benchmarks.timing import (
    lengths,
    names_out_of,
    positive,
    rows_so_far,
    until_deadline,
    write_results,
)
from configs import tinystories
from seqmodels import mixers
from seqmodels.circumstances import circumstances
from seqmodels.comparison import cost
from seqmodels.config import RunConfig, from_config_dict
from seqmodels.errors import UserError

VOCAB_SIZE = 32_000
# Width, repeats, heads; rows and tokens of a batch.
SIZES = {"15M": (288, 6, 6, 128, 512), "130M": (768, 12, 12, 32, 1024), "tiny": (64, 1, 2, 2, 32)}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mixers", type=names_out_of("mixer", mixers.names()), default=",".join(mixers.names()), help="whose models"
    )
    parser.add_argument("--sizes", type=names_out_of("size", SIZES), default="15M,130M", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--contexts", type=lengths, default="1024,16384", help="tokens read before one is timed")
    parser.add_argument("--minutes", type=positive, default=60, help="no further row is begun after so many")


def run(options: argparse.Namespace) -> dict:
    device = jax.devices()[0].device_kind
    results = {"rows": rows_so_far(options.out, device)}
    done = {(row["mixer"], row["size"]) for row in results["rows"]}
    wanted = [(name, size) for size in options.sizes for name in options.mixers if (name, size) not in done]
    commit = circumstances()["commit"]
    print(f"\n  {'mixer':18s} {'size':>5s} {'parameters':>12s} {'tokens/s':>10s} {'of peak':>8s} {'step GiB':>9s}  decoding")
    for name, size in until_deadline(wanted, options.minutes):
        row = {"mixer": name, "size": size, "commit": commit}
        try:
            row |= dataclasses.asdict(
                cost.measure(model_config(name, size), VOCAB_SIZE, contexts=options.contexts, decode_tokens=64)
            )
        except jax.errors.JaxRuntimeError as error:
            row |= {"device": device, "lacking": str(error).splitlines()[0][:200]}
        results["rows"].append(row)
        print_row(row)
        write_results(options.out, results)
    return results


def model_config(name: str, size: str) -> RunConfig:
    """A model of the mixer at its paper's layers, in bfloat16.

    Raises:
        UserError: the mixer cannot be had at this width.
    """
    width, repeats, heads, rows, tokens = SIZES[size]
    config = tinystories.get_config(name)
    config.model.d_model, config.model.repeats = width, repeats
    config.model.compute_dtype = "bfloat16"
    config.data.batch_size, config.data.seq_len = rows, tokens
    options = config.model.mixers[name]
    if "num_heads" in options:
        options.num_heads = heads
    try:
        return from_config_dict(config)
    except UserError as error:
        raise UserError(f"{name} at {size}: {error}") from error


def print_row(row: dict) -> None:
    if "lacking" in row:
        print(f"  {row['mixer']:18s} {row['size']:>5s} {row['lacking']}")
        return
    used = row["flop_utilisation"]
    step = row["train_step_bytes"]
    print(
        f"  {row['mixer']:18s} {row['size']:>5s} {row['parameters']:12,d} {row['train_tokens_per_second']:10,.0f} "
        f"{'' if used is None else f'{used:.1%}':>8s} {'' if step is None else f'{step / 2**30:.1f}':>9s}  "
        + ", ".join(f"{1e3 * seconds:.3f} at {int(context):,}" for context, seconds in row["decode_seconds"].items()),
        flush=True,
    )
