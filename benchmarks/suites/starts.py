"""--suite=starts: the same models trained from different starts: does a ranking show architectures, or how they begin?

Every mixer, and a model of MLPs alone that sees no other token, at a size that trains in seconds. A start says with which rms
the token and each layer's output enter the residual stream (config.model.embedding_norm and branch_rms). Of each run: the
validation loss at the end, the loss after one token of context, where there is nothing to mix, and what the untrained model
does to the stream. Results are written after each row to --out; a row that stands there already is not trained again.
tools/pages/starts.py makes docs/starts.md of them.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import (
    Progress,
    lengths,
    names_out_of,
    numbers,
    positive,
    write_results,
)
from configs import tinystories
from seqmodels import mixers, model
from seqmodels.circumstances import circumstances
from seqmodels.comparison import audit, plan
from seqmodels.config import RunConfig, from_config_dict
from seqmodels.data import dataset
from seqmodels.errors import UserError
from seqmodels.pattern import split_outside_brackets
from seqmodels.training import optimizer, step

NO_MIXER = "no_mixer"
STARTS = {
    "equal": {"embedding_norm": True, "branch_rms": 0.3},  # what configs/base.py has
    "norm": {"embedding_norm": True, "branch_rms": None},
    "zero": {"embedding_norm": True, "branch_rms": 0.0},
    "large": {"embedding_norm": True, "branch_rms": 1.0},
    "unscaled": {"embedding_norm": False, "branch_rms": None},  # what runs had before there was branch_rms
}
SEQ_LEN, BATCH_SIZE, VOCAB_SIZE = 128, 8, 1024
VALIDATION_BATCHES = 64


def add_flags(parser: argparse.ArgumentParser) -> None:
    names = (NO_MIXER, *mixers.names())
    parser.add_argument("--source", default="toy", help="the text: a path, a hub id, or toy")
    parser.add_argument(
        "--mixers",
        type=_models,
        default=",".join(names),
        help="whose models; a pattern is a model of its layers, as in a comparison",
    )
    parser.add_argument("--starts", type=names_out_of("start", STARTS), default="equal,unscaled", help=f"of {', '.join(STARTS)}")
    parser.add_argument("--widths", type=lengths, default="64", help="of the residual stream")
    parser.add_argument("--repeats", type=positive, default=4, help="of the layers")
    parser.add_argument("--rates", type=numbers, default="0.008", help="peak learning rates")
    parser.add_argument("--seeds", type=positive, default=1, help="runs of each")
    parser.add_argument("--steps", type=positive, default=150, help="optimizer steps of 8 x 128 tokens")


def run(options: argparse.Namespace) -> dict:
    results = _results_so_far(options.out)
    done = {_key(row) for row in results["rows"]}
    wanted = [
        {
            "mixer": name,
            "width": width,
            "start": start,
            "learning_rate": rate,
            "seed": seed,
            "steps": options.steps,
            "repeats": options.repeats,
        }  # fmt: skip
        for name in options.mixers
        for width in options.widths
        for start in options.starts
        for rate in options.rates
        for seed in range(options.seeds)
    ]
    wanted = [row for row in wanted if _key(row) not in done]
    commit = circumstances()["commit"]
    clock = Progress({_name(row): row["width"] for row in wanted})
    runner = Runner(options.source)
    print(f"\n  {'run':44s} {'loss':>7s} {'at 1':>7s} {'token share, first .. last layer':>34s}")
    for row in wanted:
        clock.start(_name(row))
        row |= runner.measure(row) | {"commit": commit, "source": options.source}
        results["rows"].append(row)
        shares = f"{row['token_share'][0]:.2f} .. {row['token_share'][-1]:.2f}"
        print(f"  {_name(row):44s} {row['loss']:7.3f} {row['position_1_loss']:7.3f} {shares:>34s}", flush=True)
        write_results(options.out, results)
    return results


class Runner:
    """Trains models on one text; a program serves all runs of a mixer, width and number of parameters."""

    def __init__(self, source: str):
        self.source = source
        self._data = {}
        self._programs = {}

    def measure(self, row: dict) -> dict:
        """Losses in nats per token and the figures of the untrained model.

        Raises:
            UserError: the text cannot be read, or the mixer cannot be had at this width.
        """
        config = run_config(row, self.source)
        data = self._dataset(config)
        vocab_size = data.vocab_size
        # Which programs there are: how the parameters begin is no part of one.
        structure = dataclasses.replace(config.model, branch_rms=None)
        if structure not in self._programs:
            self._programs = {structure: Programs(structure, vocab_size, config)}  # older ones are not asked for again
        programs = self._programs[structure]

        key = jax.random.key(config.seed)
        batch = data.train_batch(0)
        figures = audit.start_figures(config.model, vocab_size, key, batch["inputs"], targets=batch["targets"])
        params = jax.jit(model.init_params, static_argnums=(0, 1))(config.model, vocab_size, key)
        state = {"params": params, "optimizer": programs.init(params), "step": jnp.zeros((), jnp.int32)}
        for index in range(config.train.steps):
            state = programs.train(state, data.train_batch(index), config.optim.learning_rate)
        by_position = programs.losses(state["params"], self._validation)
        return {
            "loss": float(by_position.mean()),
            "position_1_loss": float(by_position[0]),
            "token_share": figures.token_share,
            "stream_rms": figures.stream_rms,
            "branch_rms": figures.branch_rms,
            "gradient_norms": figures.gradient_norms,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        }

    def _dataset(self, config: RunConfig):
        if config.seed not in self._data:
            self._data[config.seed] = data = dataset.prepare(config.data, seed=config.seed)
            if not hasattr(self, "_validation"):  # the same for all seeds
                batches = data.validation.batches(BATCH_SIZE, SEQ_LEN, VALIDATION_BATCHES * BATCH_SIZE * SEQ_LEN)
                whole = [batch for batch in batches if batch["inputs"].shape[0] == BATCH_SIZE]
                names = ("inputs", "targets", "weights")
                self._validation = {name: np.stack([batch[name] for batch in whole]) for name in names}
        return self._data[config.seed]


class Programs:
    """What a run computes, for any learning rate and any parameters of one structure."""

    def __init__(self, structure: model.ModelConfig, vocab_size: int, config: RunConfig):
        graphdef = model.graphdef(structure, vocab_size)
        decayed = model.weight_decay_mask(structure, vocab_size)

        def adamw(rate):
            schedule = optimizer.learning_rate_schedule(config.optim, config.train.steps, rate)
            return optimizer.make_optimizer(config.optim, schedule, decayed), schedule

        def train(state, batch, rate):
            return step.train_step(graphdef, *adamw(rate), state, batch, accumulation_steps=1, dropout_seed=None, labelled=False)[
                0
            ]

        def losses(params, batches):
            sums = jax.lax.map(lambda batch: step.eval_step(graphdef, params, batch, labelled=False), batches)
            return sums["loss"].sum(0) / sums["weight"].sum(0)

        self.init = adamw(1.0)[0].init
        self._train = jax.jit(train, donate_argnums=0)
        self._losses = jax.jit(losses)

    def train(self, state: dict, batch: dict, rate: float) -> dict:
        """The train state after one step."""
        return self._train(state, {name: jnp.asarray(array) for name, array in batch.items()}, jnp.float32(rate))

    def losses(self, params: dict, batches: dict) -> np.ndarray:
        """Nats per token at each position [T]; the arrays of ``batches`` are [batches, B, T]."""
        return np.asarray(self._losses(params, batches), np.float64)


def run_config(row: dict, source: str) -> RunConfig:
    """The config of a row."""
    config = tinystories.get_config("attention")
    config.data.source, config.data.seq_len, config.data.batch_size = source, SEQ_LEN, BATCH_SIZE
    config.data.vocab_size = VOCAB_SIZE
    config.model.pattern = _pattern(row["mixer"])
    config.model.d_model, config.model.repeats = row["width"], row["repeats"]
    config.model.mixers.mamba2.head_dim = 16
    config.model.update(STARTS[row["start"]])
    config.optim.learning_rate, config.train.steps, config.seed = row["learning_rate"], row["steps"], row["seed"]
    return from_config_dict(config)


def _models(text: str) -> tuple[str, ...]:
    """The type of --mixers: names and patterns, commas between them."""
    names = tuple(dict.fromkeys(name.strip() for name in split_outside_brackets(text, ",")))
    try:
        for name in names:
            _pattern(name)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return names


def _pattern(name: str) -> str:
    """The layers of a row's model."""
    if name == NO_MIXER:
        return "mlp"
    [pattern] = plan.entries(name, {"model": {"pattern": "attention mlp"}}).values()
    return pattern


def _results_so_far(path: Path | None) -> dict:
    if path is None or not path.exists():
        return {"rows": []}
    return json.loads(path.read_text(encoding="utf-8"))


def _key(row: dict) -> tuple:
    return tuple(row[name] for name in ("mixer", "width", "start", "learning_rate", "seed", "steps", "repeats"))


def _name(row: dict) -> str:
    return f"{row['mixer']}, width {row['width']}, {row['start']}, rate {row['learning_rate']:g}, seed {row['seed']}"
