"""What a comparison consists of: who is compared, at which sizes, and which runs that takes, each with its folder."""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

from ml_collections import ConfigDict

from seqmodels import channel_layers, mixers
from seqmodels import config as config_lib
from seqmodels.comparison import sizes
from seqmodels.comparison.sizes import QUANTITIES, Matched
from seqmodels.config import RunConfig
from seqmodels.data import TEXT
from seqmodels.errors import UserError
from seqmodels.formats.limits import excerpt
from seqmodels.pattern import (
    channel_layers_in_pattern,
    layer_name,
    mixers_in_pattern,
    parse_pattern,
    split_outside_brackets,
)
from seqmodels.ranges import Above, AtMost, AtMostValues, Below, Checked, Count, CountOrZero, Distinct, NotEmpty, OneOf, Positive
from seqmodels.training import loop
from seqmodels.training.optimizer import OptimConfig

MATCH_NONE = "none"  # the rule that matches nothing
CONTROL = "no_mixer"  # label of the control
# What else there is in a comparison's folder, beside those of its candidates: comparison.report writes most of it.
OWN_NAMES = (
    "figures", "frequent_pairs.npy", "methods.tex", "references.bib", "report.html", "report.md", "results.json", "table.csv",
    "table.tex",
)  # fmt: skip
MOST_SEEDS = 1000
MOST_RATES = 100
MOST_CONTEXTS = 100
MOST_MIXERS = 200
MOST_RUNS = 20_000  # that there can be: their folders are looked at before anything is trained
MOST_TOKENS = 2**24  # read, or decoded, for a measurement of speed
EXTENSION = 2.0  # ratio of a learning rate beyond the grid to the grid's end


@dataclasses.dataclass(frozen=True)
class CompareConfig(Checked, where="config"):
    """How to compare. configs/compare/base.py says what each field means."""

    mixers: str
    match: Annotated[str, OneOf((*QUANTITIES, MATCH_NONE))]
    tolerance: Annotated[float, Above(0), Below(1)]
    control: bool
    learning_rates: Annotated[tuple[Positive, ...], NotEmpty(), AtMostValues(MOST_RATES), Distinct()]
    rate_steps: CountOrZero
    rate_seeds: Annotated[Count, AtMost(MOST_SEEDS)]
    rate_extensions: Annotated[CountOrZero, AtMost(32)]
    check_rates: bool
    seeds: Annotated[Count, AtMost(MOST_SEEDS)]
    validation_tokens: CountOrZero
    contexts: Annotated[tuple[Annotated[Count, AtMost(MOST_TOKENS)], ...], NotEmpty(), AtMostValues(MOST_CONTEXTS), Distinct()]
    decode_tokens: Annotated[Count, AtMost(MOST_TOKENS)]

    def __post_init__(self):
        super().__post_init__()
        if not self.rate_steps and self.rate_seeds > self.seeds:
            raise UserError(
                f"config.rate_seeds={self.rate_seeds} must be at most config.seeds={self.seeds} where config.rate_steps is 0: "
                "the runs that choose the rate are then among those reported"
            )


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """One run of train.py."""

    folder: Path
    config: RunConfig
    label: str  # of its candidate

    @property
    def learning_rate(self) -> float:
        return self.config.optim.learning_rate

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def steps(self) -> int:
        return self.config.train.steps

    def __str__(self) -> str:
        return f"{self.label} lr {self.learning_rate:g} seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One of those compared."""

    label: str
    folder: Path
    matched: Matched
    config: RunConfig  # at its sizes; the learning rate and the seed are the base's

    @property
    def is_control(self) -> bool:
        """It has channel layers alone, and so sees no other token."""
        return not mixers_in_pattern(self.matched.sizes.pattern)


class Plan:
    """All runs of a comparison. Which of them are due depends on what the earlier ones come to.

    Attributes:
        compare: the CompareConfig.
        base: the complete training config as a nested dict.
        candidates: in the order given, the control last; the first is the reference.
    """

    def __init__(self, config: ConfigDict, workdir: Path, vocab_size: int):
        """Solves for the sizes of every candidate; nothing is run or written.

        Args:
            config: a resolved config of configs/compare.
            vocab_size: tokens of the tokenizer.

        Raises:
            UserError: an impossible field, an unknown mixer, sizes that cannot be matched.
        """
        self.compare, self.base = read(config)
        self.workdir = workdir
        self.candidates = self._candidates(vocab_size)

    def _candidates(self, vocab_size: int) -> tuple[Candidate, ...]:
        found, target = [], None
        quantity = "params" if self.compare.match == MATCH_NONE else self.compare.match
        for label, pattern in self._entries().items():
            base_sizes = sizes.base_sizes(self.base, pattern)
            if target is None or self.compare.match == MATCH_NONE:
                counted = sizes.count(quantity, sizes.with_sizes(self.base, base_sizes), vocab_size)
                target = counted if target is None else target
                matched = Matched(base_sizes, counted, counted / target - 1.0)
            elif quantity == "state_bytes" and not mixers_in_pattern(pattern):
                matched = self._without_state(label, pattern, vocab_size)
            else:
                matched = sizes.match(
                    label, quantity, self.base, pattern, vocab_size, target=target, tolerance=self.compare.tolerance
                )
            config = sizes.with_sizes(self.base, matched.sizes)
            found.append(Candidate(label, self.workdir / folder_name(label), matched, config))
        return tuple(found)

    def _entries(self) -> dict[str, str]:
        """Labels and patterns, the control's among them.

        Raises:
            UserError: the control's label is another's.
        """
        found = entries(self.compare.mixers, self.base)
        wanted = self.compare.control and self.base["data"]["task"] == TEXT
        if not wanted or not all(map(mixers_in_pattern, found.values())):
            return found
        if CONTROL in map(folder_name, found):
            raise UserError(
                f"config.mixers names {CONTROL!r}, which is the control's label: rename it, or set config.control=False"
            )
        return found | {CONTROL: _channel_layer(self.base) or channel_layers.DEFAULT}

    def _without_state(self, label: str, pattern: str, vocab_size: int) -> Matched:
        """Of layers that carry no state, sizes that match in parameters."""
        first = sizes.with_sizes(self.base, sizes.base_sizes(self.base, next(iter(self._entries().values()))))
        target = sizes.count("params", first, vocab_size)
        matched = sizes.match(label, "params", self.base, pattern, vocab_size, target=target, tolerance=self.compare.tolerance)
        return Matched(matched.sizes, 0.0, -1.0)

    def rates(self) -> list[float]:
        """The grid of learning rates."""
        return sorted(map(float, self.compare.learning_rates))

    def rate_runs(self, candidate: Candidate, rates: Iterable[float]) -> list[RunPlan]:
        """Those that choose the learning rate among `rates`."""
        steps = self.compare.rate_steps or None
        return [self._run(candidate, rate, index, steps) for rate in sorted(rates) for index in range(self.compare.rate_seeds)]

    def seed_runs(self, candidate: Candidate, rate: float) -> list[RunPlan]:
        """Those that are reported, at the best rate."""
        return [self._run(candidate, rate, index, None) for index in range(self.compare.seeds)]

    def all_runs(self, candidate: Candidate, rates: Iterable[float], best: float | None) -> list[RunPlan]:
        """Each run once that is due for a candidate whose rates and best rate are these; where that is open, any will do."""
        rates = sorted(rates)
        lasting = rates if self.compare.check_rates else [rates[0] if best is None else best]
        runs = [*self.rate_runs(candidate, rates), *(run for rate in lasting for run in self.seed_runs(candidate, rate))]
        return list({run.folder: run for run in runs}.values())

    def _run(self, candidate: Candidate, rate: float, index: int, steps: int | None) -> RunPlan:
        config, seed = candidate.config, candidate.config.seed + index
        optim = dataclasses.replace(config.optim, learning_rate=float(rate))
        train = config.train
        if steps is not None:
            optim = _shortened(optim, steps / train.steps)
            train = dataclasses.replace(train, steps=steps)
        config = dataclasses.replace(config, seed=seed, optim=optim, train=train)
        kind = "" if steps is None else f"_{steps}_steps"
        short = f"{rate:g}" if float(f"{rate:g}") == rate else repr(float(rate))
        return RunPlan(candidate.folder / f"lr{short}{kind}" / f"seed{seed}", config, candidate.label)


def _shortened(optim: OptimConfig, share: float) -> OptimConfig:
    """The same schedule in a share of the steps: warm-up and decay take as large a part of a short run as of a long one."""

    def of(steps):
        return None if steps is None else max(min(steps, 1), round(steps * share))

    return dataclasses.replace(optim, warmup_steps=of(optim.warmup_steps), decay_steps=of(optim.decay_steps))


def read(config: ConfigDict) -> tuple[CompareConfig, dict]:
    """A comparison's config as its dataclass, and `config.base` as a complete nested dict.

    Raises:
        UserError: a field is missing, unknown, of another type or impossible.
    """
    values = config.copy_and_resolve_references().to_dict()
    if not isinstance(values.get("base"), Mapping):
        raise UserError("the config has no field base: it is not a comparison's (see configs/compare)")
    base = values.pop("base")
    config_lib.from_config_dict(base)  # raises what is wrong with it
    compare = config_lib.build(CompareConfig, values, "config")
    _check_number_of_runs(compare, len(entries(compare.mixers, base)))  # likewise
    return compare, base


def _check_number_of_runs(compare: CompareConfig, num_mixers: int) -> None:
    added = 2 * compare.rate_extensions
    runs = num_mixers * (len(compare.learning_rates) + added) * (compare.rate_seeds + compare.seeds)
    if runs > MOST_RUNS:
        raise UserError(
            f"this comparison may come to {runs:,} runs, more than {MOST_RUNS:,}: config.mixers has {num_mixers}, "
            f"config.learning_rates {len(compare.learning_rates)} and config.rate_extensions up to {added} more, "
            f"config.rate_seeds {compare.rate_seeds} and config.seeds {compare.seeds}"
        )


def entries(text: str, base: Mapping) -> dict[str, str]:
    """Labels and patterns of `config.mixers`: "gla, hybrid=mamba2 mlp attention mlp".

    A name alone stands for the layers that its paper has in the place of attention and MLP; where the base has no channel layers, for
    one layer of it.

    Raises:
        UserError: an unknown mixer, an empty entry, or a label twice.
    """
    found, parts = {}, split_outside_brackets(text, ",")
    if len(parts) > MOST_MIXERS:
        raise UserError(f"config.mixers has {len(parts):,} entries, more than {MOST_MIXERS}")
    for entry in parts:
        label, *pattern = (part.strip() for part in split_outside_brackets(entry, "="))
        pattern = "=".join(pattern)
        specs = parse_pattern(pattern or label) if pattern or label else ()
        if not specs:
            raise UserError(f"config.mixers={excerpt(text)} has an empty entry; write names, commas between them")
        if len(specs) == 1 and not pattern:
            channel_layer = _channel_layer(base)
            pattern = label if channel_layer is None else _with_channel_layer(specs[0], channel_layer)
        elif not pattern:
            label, pattern = " ".join(specs), " ".join(specs)
        if label in found:
            raise UserError(f"config.mixers={excerpt(text)} names {excerpt(label)} twice")
        found[label] = " ".join(pattern.split())
    if len({folder_name(label) for label in found}) < len(found):
        raise UserError(f"config.mixers={excerpt(text)}: two labels make the same folder name; rename one")
    own = next((label for label in found if folder_name(label).lower() in OWN_NAMES), None)
    if own is not None:
        raise UserError(
            f"config.mixers={excerpt(text)}: {excerpt(own)} would be a folder where the report has {folder_name(own)}; rename it"
        )
    return found


def _channel_layer(base: Mapping) -> str | None:
    """The first channel layer of a base; None where it has none."""
    return next(iter(channel_layers_in_pattern(base["model"]["pattern"])), None)


def _with_channel_layer(spec: str, channel_layer: str) -> str:
    """The layers that stand where a Transformer has attention and MLP; of mixers side by side: they and the channel layer."""
    name = layer_name(spec)
    layers = mixers.pattern(name, channel_layer).split() if name in mixers.names() else (name, channel_layer)
    return " ".join(spec if layer == name else layer for layer in layers)


def folder_name(label: str) -> str:
    """A label as the name of a folder; a long one is cut and told apart by a digest."""
    name = re.sub(r"[^\w.-]+", "_", label).strip("._")
    if len(name) <= 60 and name:
        return name
    return f"{name[:50]}_{hashlib.blake2b(label.encode(), digest_size=4).hexdigest()}"


def check_folders(plan: Plan) -> None:
    """Raise UserError if a planned run's folder holds a run of another config."""
    rates = plan.rates()
    beyond = [EXTENSION ** (index + 1) for index in range(plan.compare.rate_extensions)]
    rates = [*rates, *(rates[0] / factor for factor in beyond), *(rates[-1] * factor for factor in beyond)]
    for candidate in plan.candidates:
        runs = plan.rate_runs(candidate, rates) + [run for rate in rates for run in plan.seed_runs(candidate, rate)]
        for run in runs:
            path = run.folder / "config.json"
            if path.exists():
                changed = config_lib.differences(config_lib.load(path), run.config)
                changed = {name: values for name, values in changed.items() if name not in loop.RESUMABLE_FIELDS}
                if changed:
                    (name, (before, after)), *_ = changed.items()
                    raise UserError(f"{run.folder} holds a run with {name} {before!r}, not {after!r}: choose another --workdir")
