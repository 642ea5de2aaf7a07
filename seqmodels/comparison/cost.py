"""What a candidate costs, whatever it has learnt: the training step, decoding, memory, state. Nothing else should run beside it."""

import dataclasses
import os
import statistics
import time

import jax
import numpy as np

from seqmodels.config import MeshConfig, RunConfig
from seqmodels.evaluation import decode
from seqmodels.evaluation.perplexity import state_bytes
from seqmodels.training.log import PEAK_FLOPS, peak_flops_per_second
from seqmodels.training.state import Trainer

STEPS = 5  # timed, after two that are not
DECODE_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Cost:
    """Measured on one device, of random weights and tokens; `None` is what could not be known."""

    device: str
    parameters: int
    flops_per_token: float  # of training
    train_tokens_per_second: float  # the median step's
    flop_utilisation: float | None  # of the data sheet's peak
    peak_flops_per_second: float | None
    train_step_bytes: int | None  # arguments, outputs and temporaries of the compiled training step
    state_bytes: dict[str, int]  # of one sequence, by context
    decode_seconds: dict[str, float]  # of one token for one sequence, by context
    load_per_core: float  # processes that wanted a core in the minute before, this comparison's own among them


def measure(config: RunConfig, vocab_size: int, *, contexts: tuple[int, ...], decode_tokens: int) -> Cost:
    """Compile and time; a minute or less for small models.

    Args:
        vocab_size: tokens of the tokenizer.
        contexts: tokens read before those that are timed.
        decode_tokens: how many are timed.
    """
    load = os.getloadavg()[0] / os.cpu_count()
    device = jax.devices()[0]
    one_device = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=1, tensor=1, sequence=1))
    trainer = Trainer(one_device, vocab_size, devices=[device])
    step, params, seconds = _timed_step(trainer)
    tokens_per_second = config.data.batch_size * config.data.seq_len / seconds
    # A CPU has no figure to be held against: what its matrix product reaches is no limit of other work.
    known = any(name.lower() in device.device_kind.lower() for name in PEAK_FLOPS)
    peak = peak_flops_per_second([device]) if known else None
    flops = trainer.flops_per_token
    decode_seconds = {
        str(context): decode.measure(
            trainer.graphdef, params, trainer.vocab_size,
            batch_size=1, context=context, tokens=decode_tokens, rounds=DECODE_ROUNDS, key=jax.random.key(0),
        ).seconds_per_step
        for context in contexts
    }  # fmt: skip
    lengths = sorted({*contexts, config.data.seq_len})
    return Cost(
        device=device.device_kind,
        parameters=trainer.num_parameters,
        flops_per_token=flops,
        train_tokens_per_second=tokens_per_second,
        flop_utilisation=None if peak is None else tokens_per_second * flops / peak,
        peak_flops_per_second=peak,
        train_step_bytes=_bytes(step),
        state_bytes={str(length): state_bytes(trainer.graphdef, params, length) for length in lengths},
        decode_seconds=decode_seconds,
        load_per_core=load,
    )


def _timed_step(trainer: Trainer) -> tuple[jax.stages.Compiled, dict, float]:
    """The compiled training step, the parameters after some of them, and the median seconds of a step."""
    of = trainer.config.data
    tokens = np.random.default_rng(0).integers(trainer.vocab_size, size=(of.batch_size, of.seq_len + 1), dtype=np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    if of.packing == "documents":
        batch["reset"] = np.zeros((of.batch_size, of.seq_len), bool)
        batch["weights"] = np.ones((of.batch_size, of.seq_len), np.float32)
    batch = trainer.put(batch)
    step = trainer.trace(batch).lower().compile()
    state, seconds = trainer.init(), []
    for _ in range(2 + STEPS):
        begun = time.perf_counter()
        state, metrics = step(state, batch, trainer.peak_rate)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - begun)
    return step, state["params"], statistics.median(seconds[2:])


def _bytes(compiled) -> int | None:
    """What the compiler has allotted, arguments that are donated counted once."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(held + memory.temp_size_in_bytes)
