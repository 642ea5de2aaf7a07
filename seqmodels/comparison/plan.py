"""What a comparison consists of: who is compared, at which sizes, and which runs that takes, each with its folder."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from ml_collections import ConfigDict

from seqmodels import config as config_lib
from seqmodels import mixers
from seqmodels.comparison import sizes
from seqmodels.comparison.sizes import QUANTITIES, Matched
from seqmodels.config import RunConfig
from seqmodels.errors import UserError
from seqmodels.model import MLP, parse_pattern
from seqmodels.ranges import Above, AtMost, Below, Checked, Count, CountOrZero, Distinct, NotEmpty, OneOf, Positive
from seqmodels.training import loop

MATCH_NONE = "none"  # the rule that matches nothing


@dataclasses.dataclass(frozen=True)
class CompareConfig(Checked, where="config"):
    """How to compare. configs/compare/base.py says what each field means."""

    mixers: str
    match: Annotated[str, OneOf((*QUANTITIES, MATCH_NONE))]
    tolerance: Annotated[float, Above(0), Below(1)]
    learning_rates: Annotated[tuple[Positive, ...], NotEmpty(), Distinct()]
    rate_steps: CountOrZero
    rate_seeds: Annotated[Count, AtMost("seeds")]
    seeds: Count
    validation_tokens: CountOrZero
    contexts: Annotated[tuple[Count, ...], NotEmpty(), Distinct()]
    decode_tokens: Count


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


class Plan:
    """All runs of a comparison. Which of them are due depends on what the earlier ones come to.

    Attributes:
        compare: the CompareConfig.
        base: the complete training config as a nested dict.
        candidates: in the order given; the first is the reference.
    """

    def __init__(self, config: ConfigDict, workdir: Path, vocab_size: int):
        """Solves for the sizes of every candidate; nothing is run or written.

        Args:
            config: a resolved config of configs/compare.
            vocab_size: pieces of the tokenizer.

        Raises:
            UserError: an impossible field, an unknown mixer, sizes that cannot be matched.
        """
        self.compare, self.base = read(config)
        self.workdir = workdir
        self.candidates = self._candidates(vocab_size)

    def _candidates(self, vocab_size: int) -> tuple[Candidate, ...]:
        found, target = [], None
        quantity = "params" if self.compare.match == MATCH_NONE else self.compare.match
        for label, pattern in entries(self.compare.mixers, self.base).items():
            as_the_base = sizes.as_the_base(self.base, pattern)
            if target is None or self.compare.match == MATCH_NONE:
                counted = sizes.count(quantity, sizes.with_sizes(self.base, as_the_base), vocab_size)
                target = counted if target is None else target
                matched = Matched(as_the_base, counted, counted / target - 1.0)
            else:
                matched = sizes.match(
                    label, quantity, self.base, pattern, vocab_size, target=target, tolerance=self.compare.tolerance
                )
            config = sizes.with_sizes(self.base, matched.sizes)
            found.append(Candidate(label, self.workdir / folder_name(label), matched, config))
        return tuple(found)

    def rate_runs(self, candidate: Candidate) -> list[RunPlan]:
        """Those that choose the learning rate."""
        rates = sorted(self.compare.learning_rates)
        steps = self.compare.rate_steps or None
        return [self._run(candidate, rate, index, steps) for rate in rates for index in range(self.compare.rate_seeds)]

    def seed_runs(self, candidate: Candidate, rate: float) -> list[RunPlan]:
        """Those that are reported, at the best rate."""
        return [self._run(candidate, rate, index, None) for index in range(self.compare.seeds)]

    def number_of_runs(self) -> int:
        """Of all candidates, if none diverges."""
        rate_runs = len(self.compare.learning_rates) * self.compare.rate_seeds
        reused = 0 if self.compare.rate_steps else self.compare.rate_seeds
        return len(self.candidates) * (rate_runs + self.compare.seeds - reused)

    def _run(self, candidate: Candidate, rate: float, index: int, steps: int | None) -> RunPlan:
        config, seed = candidate.config, candidate.config.seed + index
        train = config.train if steps is None else dataclasses.replace(config.train, steps=steps)
        config = dataclasses.replace(
            config, seed=seed, optim=dataclasses.replace(config.optim, learning_rate=float(rate)), train=train
        )
        kind = "" if steps is None else f"_{steps}_steps"
        short = f"{rate:g}" if float(f"{rate:g}") == rate else repr(float(rate))
        return RunPlan(candidate.folder / f"lr{short}{kind}" / f"seed{seed}", config, candidate.label)


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
    entries(compare.mixers, base)  # likewise
    return compare, base


def entries(text: str, base: Mapping) -> dict[str, str]:
    """Labels and patterns of `config.mixers`: "gla, hybrid=mamba2 mlp attention mlp".

    A name alone stands for the layers that its paper has in the place of attention and MLP; where the base has no MLPs, for
    one layer of it.

    Raises:
        UserError: an unknown mixer, an empty entry, or a label twice.
    """
    found = {}
    for entry in text.split(","):
        label, _, pattern = (part.strip() for part in entry.partition("="))
        words = (pattern or label).split()
        if not words:
            raise UserError(f"config.mixers={text!r} has an empty entry; write names, commas between them")
        if len(words) == 1 and not pattern:
            pattern = mixers.pattern(label)
            if MLP not in parse_pattern(base["model"]["pattern"]):
                pattern = label
        elif not pattern:
            label, pattern = " ".join(words), " ".join(words)
        if label in found:
            raise UserError(f"config.mixers={text!r} names {label!r} twice")
        found[label] = " ".join(pattern.split())
    if len({folder_name(label) for label in found}) < len(found):
        raise UserError(f"config.mixers={text!r}: two labels make the same folder name; rename one")
    return found


def folder_name(label: str) -> str:
    """A label as the name of a folder; a long one is cut and told apart by a digest."""
    name = re.sub(r"[^\w.-]+", "_", label).strip("._")
    if len(name) <= 60 and name:
        return name
    return f"{name[:50]}_{hashlib.blake2b(label.encode(), digest_size=4).hexdigest()}"


def check_folders(plan: Plan) -> None:
    """Raise UserError if a planned run's folder holds a run of another config."""
    for candidate in plan.candidates:
        rates = sorted(plan.compare.learning_rates)
        runs = plan.rate_runs(candidate) + [run for rate in rates for run in plan.seed_runs(candidate, rate)]
        for run in runs:
            path = run.folder / "config.json"
            if path.exists():
                changed = config_lib.differences(config_lib.load(path), run.config)
                changed = {name: values for name, values in changed.items() if name not in loop.RESUMABLE_FIELDS}
                if changed:
                    (name, (before, after)), *_ = changed.items()
                    raise UserError(
                        f"{run.folder} holds a run with {name} {before!r}, not {after!r}: choose another --workdir"
                    )
