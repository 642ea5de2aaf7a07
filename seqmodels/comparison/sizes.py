"""Sizes at which an architecture has as many parameters as another, or costs as many FLOPs, or carries as large a state.

Everything is counted over shapes and traces (`jax.eval_shape`): nothing is computed. All three quantities are, at one width D,

    Q(R, F) = a + R (b + c F)        R repeats, F hidden width of the channel layers

so three counts at a width say what every R and F give; between widths that are counted a straight line says where to look next.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping

import jax

from seqmodels import channel_layers, model
from seqmodels.config import RunConfig, from_config_dict
from seqmodels.errors import UserError
from seqmodels.evaluation import perplexity
from seqmodels.pattern import channel_layers_in_pattern, parse_pattern
from seqmodels.training import flops

QUANTITIES = {
    "params": "parameters",
    "flops": "FLOPs of a training step, per token",
    "state_bytes": "bytes of state of one sequence of data.seq_len tokens",
}
STEPS = (32, 16, 8, 4, 2, 1)  # widths are multiples of the largest of these that will do: it is what devices like
ROUNDING_PENALTY = 0.02  # a width that is a multiple of 16 and not of 32 counts as a change of 2 %, of 8 alone as 4 %, ...
# The ratio to the base beyond which a width or a number of repeats is not looked for: it would be another experiment.
MAX_RATIO = {"params": 2, "flops": 2, "state_bytes": 4}
MLP_MAX_RATIO = 2.0  # and a width of MLPs, to its default: beyond, it is another architecture
MOST_COUNTS = 100  # before giving up


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the solver may choose."""

    pattern: str
    repeats: int
    d_model: int
    mlp_hidden: int | None  # of every channel layer; None: the default of the width

    def __str__(self) -> str:
        mlp = "" if self.mlp_hidden is None else f", MLP width {self.mlp_hidden}"
        return f"{self.repeats} x [{', '.join(parse_pattern(self.pattern))}], width {self.d_model}{mlp}"

    def applied_to(self, model: Mapping) -> dict:
        """The nested dict of a config's model, at these sizes."""
        options = dict(model["channel_layers"])
        for name in channel_layers_in_pattern(self.pattern):
            if name in options:  # ModelConfig says what is missing
                options[name] = {**options[name], "hidden": self.mlp_hidden}
        sizes = {"pattern": self.pattern, "repeats": self.repeats, "d_model": self.d_model}
        return {**model, **sizes, "channel_layers": options}


@dataclasses.dataclass(frozen=True)
class Matched:
    """The sizes found, and what they count to."""

    sizes: Sizes
    counted: float
    of_reference: float  # counted / the reference's - 1


def with_sizes(base: Mapping, sizes: Sizes) -> RunConfig:
    """A run of `base` (a complete nested config, with the options of every mixer) at other sizes.

    Raises:
        UserError: the sizes do not fit together.
    """
    return from_config_dict({**base, "model": sizes.applied_to(base["model"])})


def base_sizes(base: Mapping, pattern: str) -> Sizes:
    """The sizes of `base` for another pattern; the hidden width is that of its first channel layer, None if it has none."""
    of = base["model"]
    hidden = next((of["channel_layers"][name]["hidden"] for name in channel_layers_in_pattern(pattern)), None)
    return Sizes(pattern, of["repeats"], of["d_model"], hidden)


def count(quantity: str, config: RunConfig, vocab_size: int) -> float:
    """How much of a quantity of QUANTITIES a model has.

    Raises:
        UserError: sizes that do not fit together.
    """
    params = _shapes(config.model, vocab_size)
    if quantity == "params":
        return float(sum(leaf.size for leaf in jax.tree.leaves(params)))
    graphdef = model.graphdef(config.model, vocab_size)
    if quantity == "flops":
        return flops.training_flops_per_token(graphdef, params, config.data.seq_len)
    return float(perplexity.state_bytes(graphdef, params, config.data.seq_len))


def shortest(pattern: str, repeats: int) -> tuple[str, int]:
    """The same layers with as many repeats as possible: 4 x "mamba mamba" is 8 x "mamba"."""
    specs = parse_pattern(pattern)
    for length in range(1, len(specs) + 1):
        if len(specs) % length == 0 and specs[:length] * (len(specs) // length) == specs:
            return " ".join(specs[:length]), repeats * (len(specs) // length)
    raise AssertionError("a pattern is one repeat of itself")


def match(name: str, quantity: str, base: Mapping, pattern: str, vocab_size: int, *, target: float, tolerance: float) -> Matched:
    """The sizes nearest to those of `base` at which `pattern` has the quantity `target`, to within `tolerance` of it.

    Tried in this order: the base's sizes; another width of the MLPs; other repeats; other widths with the repeats and MLPs
    that fit them, the smallest change and the roundest width first.

    Args:
        name: of who is matched, for errors.
        quantity: of QUANTITIES.
        base: a complete nested config; its model has the width and the repeats to stay near to.
        tolerance: relative.

    Raises:
        UserError: there are none; names the closest.
    """
    search = _Search(quantity, base, pattern, vocab_size, target, tolerance)
    for sizes in search.candidates():
        counted = search.exact(sizes)
        if counted is not None and abs(counted / target - 1.0) <= tolerance:
            return Matched(sizes, counted, counted / target - 1.0)
        if search.counted >= MOST_COUNTS:
            break
    counted = search.exact(search.closest)
    closest = Matched(search.closest, counted, counted / target - 1.0)
    what = QUANTITIES[quantity]
    raise UserError(
        f"{name} does not come within {tolerance:.1%} of {target:,.0f} {what}; the closest is {closest.sizes} with "
        f"{closest.counted:,.0f} ({closest.of_reference:+.1%}). Allow that with --config.tolerance, change its options under "
        "config.base.model.mixers, or leave it out"
    )


class _Search:
    """Counts of one pattern, remembered, and where to look next."""

    def __init__(self, quantity: str, base: Mapping, pattern: str, vocab_size: int, target: float, tolerance: float):
        self.quantity, self.base, self.vocab_size = quantity, base, vocab_size
        self.target, self.tolerance = target, tolerance
        of = base["model"]
        self.channel_layers = channel_layers_in_pattern(pattern)
        self.has_mlp = bool(self.channel_layers)
        self.pattern, self.repeats = shortest(pattern, of["repeats"])
        self.original = base_sizes(base, pattern)
        self.d_model, self.mlp_hidden = self.original.d_model, self.original.mlp_hidden
        self.closest, self._error = self.original, math.inf
        self.counted = 0
        self._known: dict[Sizes, float | None] = {}
        self._lines: dict[int, tuple[float, float, float] | None] = {}
        self._tried: set[tuple[int, int]] = set()

    def exact(self, sizes: Sizes) -> float | None:
        """The count, or None where no such model can be built."""
        if sizes not in self._known:
            self.counted += 1
            try:
                self._known[sizes] = count(self.quantity, with_sizes(self.base, sizes), self.vocab_size)
            except UserError:
                self._known[sizes] = None
        return self._known[sizes]

    def candidates(self) -> Iterator[Sizes]:
        """Sizes that should match, the least change first."""
        # Not self.exact: what is wrong with the base is for a person to know.
        self._known[self.original] = count(self.quantity, with_sizes(self.base, self.original), self.vocab_size)
        self._note(self.original, self._known[self.original])
        yield self.original
        repeats = _by_distance(self.repeats, MAX_RATIO[self.quantity])
        for number in repeats:
            yield from self._at_width(self.d_model, number)
        for factor in sorted({2, MAX_RATIO[self.quantity]}):
            for width in (round(self.d_model / factor), round(self.d_model * factor)):
                self._line(max(1, width))
            while (found := self._nearest_other(repeats)) is not None:
                width, number = found
                self._tried.add(found)
                yield from self._at_width(width, number)

    def _nearest_other(self, repeats: list[int]) -> tuple[int, int] | None:
        """The width and the repeats that seem to match by what is counted so far, the smallest change and the roundest width."""
        best, least = None, math.inf
        for number in repeats:
            exact = self._where(number)
            for rank, step in enumerate(STEPS if exact is not None else ()):
                width = max(step, round(exact / step) * step)
                error = abs(self._estimate(width, number) / self.target - 1.0)
                change = abs(math.log(width / self.d_model)) + abs(math.log(number / self.repeats)) + ROUNDING_PENALTY * rank
                seems_to = self.has_mlp or error <= self.tolerance
                if seems_to and change < least and (width, number) not in self._tried:
                    best, least = (width, number), change
        return best

    def _where(self, repeats: int) -> float | None:
        """The width at which so many repeats should match, by bisection; None if it is not among those counted."""
        low, high = self._bounds()
        if not self._estimate(low, repeats) <= self.target <= self._estimate(high, repeats):
            return None
        for _ in range(30):
            centre = (low + high) / 2
            low, high = (centre, high) if self._estimate(centre, repeats) < self.target else (low, centre)
        return (low + high) / 2

    def _bounds(self) -> tuple[float, float]:
        known = [width for width, line in self._lines.items() if line is not None]
        return (min(known), max(known)) if known else (self.d_model, self.d_model)

    def _estimate(self, d_model: float, repeats: int) -> float:
        """Q at a width, on the straight line between the counted ones beside it; the MLPs at their default."""
        known = sorted(width for width, line in self._lines.items() if line is not None)

        def at(width):
            a, b, c = self._lines[width]
            return a + repeats * (b + c * self._default_hidden(width))

        after = bisect.bisect_left(known, d_model)
        if after < len(known) and known[after] == d_model:
            return at(known[after])
        if after in (0, len(known)):
            return math.inf if known else math.nan
        left, right = known[after - 1], known[after]
        return at(left) + (d_model - left) / (right - left) * (at(right) - at(left))

    def _at_width(self, d_model: int, repeats: int) -> Iterator[Sizes]:
        """The width of the MLPs that matches best, at one width and so many repeats, if it matches."""
        line = self._line(d_model)
        if line is None:
            return
        a, b, c = line
        hidden = self.mlp_hidden if d_model == self.d_model else None
        if self.has_mlp and c > 0:
            default = hidden or self._default_hidden(d_model)
            exact = (self.target - a - repeats * b) / (repeats * c)
            inside = min(max(exact, default / MLP_MAX_RATIO), default * MLP_MAX_RATIO)
            for step in STEPS:
                hidden = max(1, round(inside / step) * step)
                if self._note(Sizes(self.pattern, repeats, d_model, hidden), a + repeats * (b + c * hidden)):
                    break
        sizes = Sizes(self.pattern, repeats, d_model, hidden)
        if self._note(sizes, a + repeats * (b + c * (hidden or self._default_hidden(d_model)))):
            yield sizes

    def _note(self, sizes: Sizes, counted: float) -> bool:
        """Whether that is near enough; remembers the nearest."""
        error = abs(counted / self.target - 1.0)
        if error < self._error:
            self.closest, self._error = sizes, error
        return error <= self.tolerance

    def _default_hidden(self, d_model: int) -> int:
        return channel_layers.load(self.channel_layers[0]).default_hidden(d_model) if self.has_mlp else 0

    def _line(self, d_model: int) -> tuple[float, float, float] | None:
        """a, b and c of one width, or None where no model of that width can be built."""
        if d_model not in self._lines:
            hidden = 32 if self.has_mlp else None
            once = self.exact(Sizes(self.pattern, 1, d_model, hidden))
            twice = self.exact(Sizes(self.pattern, 2, d_model, hidden))
            if once is None or twice is None:
                self._lines[d_model] = None
            elif not self.has_mlp:
                self._lines[d_model] = (2 * once - twice, twice - once, 0.0)
            else:
                wider = self.exact(Sizes(self.pattern, 1, d_model, 64))
                c = (wider - once) / 32
                self._lines[d_model] = (2 * once - twice, twice - once - 32 * c, c)
        return self._lines[d_model]


def _by_distance(middle: int, max_ratio: int) -> list[int]:
    """Numbers from `middle` outwards, by ratio."""
    numbers = range(max(1, math.ceil(middle / max_ratio)), math.floor(middle * max_ratio) + 1)
    return sorted(numbers, key=lambda number: (abs(math.log(number / middle)), number))


@functools.lru_cache(maxsize=4096)
def _shapes(config: model.ModelConfig, vocab_size: int):
    return model.param_shapes(config, vocab_size)
