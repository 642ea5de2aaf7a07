"""Names beside lines and points of a figure: they do not cover each other, nor leave the figure."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.transforms import Bbox

SIDE = 1.06  # where names begin right of the axes, of their width
PADDING = 1.5  # between names, and around points, in points of 1/72 inch
RADII = (4, 9, 15, 22, 30, 40, 52, 66, 82, 100)  # of the places that are tried around a point
ANGLES = tuple(math.radians(each) for each in (35, -35, 145, -145, 90, -90, 0, 180))
SMALL, NORMAL = 6.5, 8.5  # font sizes: of those in grey, of those in colour
LINE = 24  # characters of a line of a name


def in_lines(label: str) -> str:
    """A name that is longer than a line, such as a pattern with options, broken after its commas, parentheses and spaces."""
    lines = [""]
    for part in re.findall(r"[^,( ]*[,( ]?", label):
        if lines[-1] and len(lines[-1] + part.rstrip()) > LINE:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def at_the_side(axes: Axes, label: str, y: float, colour: str) -> Text:
    """The name of a line, right of the axes at the height of its end."""
    height = axes.transAxes.inverted().transform(axes.transData.transform((1, y)))[1]
    return axes.text(
        SIDE,
        min(max(height, 0.0), 1.0),
        in_lines(label),
        transform=axes.transAxes,
        color=colour,
        fontsize=NORMAL,
        va="center",
        ha="left",
        parse_math=False,
    )


def spread(axes: Axes, names: Sequence[Text], ends: Sequence[tuple[float, float]]) -> None:
    """Move the names of lines up and down, as little as keeps them apart and beside the axes, and lead each to its line's end."""
    if not names:
        return
    box, renderer = axes.get_window_extent(), axes.figure.canvas.get_renderer()
    sizes = [name.get_window_extent(renderer).height / box.height for name in names]
    gap = max(sizes) + PADDING * axes.figure.dpi / 72 / box.height
    wanted = [axes.transAxes.inverted().transform(axes.transData.transform(end)) for end in ends]
    heights = apart([y for _, y in wanted], gap, gap / 2, 1 - gap / 2)
    for name, (x, y), height in zip(names, wanted, heights):
        name.set_y(height)
        axes.plot(
            [x, SIDE - 0.01], [y, height], transform=axes.transAxes, color=name.get_color(), lw=0.6, alpha=0.6, clip_on=False,
            scalex=False, scaley=False,
        )  # fmt: skip


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The numbers nearest to the wanted ones (least squares) that are `gap` apart and between `low` and `high`.

    With p_i = q_i + i gap, the q must not fall: isotonic regression, which pooling neighbours that fall solves. Where they do not fit
    between `low` and `high`, they share that room evenly.
    """
    count = len(wanted)
    gap = min(gap, (high - low) / max(count - 1, 1))
    order = sorted(range(count), key=lambda i: wanted[i])
    pools: list[list[float]] = []  # sum and number of those that have one value
    for rank, index in enumerate(order):
        pools.append([wanted[index] - rank * gap, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] >= pools[-1][0] / pools[-1][1]:
            total, number = pools.pop()
            pools[-1] = [pools[-1][0] + total, pools[-1][1] + number]
    levels = [total / number for total, number in pools for _ in range(int(number))]
    found = [0.0] * count
    for rank, index in enumerate(order):
        found[index] = min(max(levels[rank], low), high - (count - 1) * gap) + rank * gap
    return found


@dataclasses.dataclass(frozen=True)
class _Place:
    box: Bbox
    x: float
    y: float
    distance: float


def beside_points(axes: Axes, points: Sequence[tuple[str, float, float]], colours: Mapping[str, str], grey: str) -> list[Text]:
    """Name points: those with a colour always, the others where there is room beside them."""
    unit = axes.figure.dpi / 72
    inside, renderer = axes.get_window_extent(), axes.figure.canvas.get_renderer()
    places = {label: axes.transData.transform((x, y)) for label, x, y in points}
    taken = [Bbox.from_bounds(x - 3 * unit, y - 3 * unit, 6 * unit, 6 * unit) for x, y in places.values()]
    found = []
    for label in sorted(places, key=lambda label: label not in colours):
        named = label in colours
        text = axes.text(
            0, 0, in_lines(label), transform=None, color=colours[label] if named else grey,
            fontsize=NORMAL if named else SMALL, va="center", ha="center", zorder=4, parse_math=False,
        )  # fmt: skip
        size = text.get_window_extent(renderer)
        own = taken[list(places).index(label)]
        others = [box for box in taken if box is not own]
        place = _best_place(places[label], size.width, size.height, inside, others, unit, RADII if named else RADII[:2], named)
        if place is None:
            text.remove()
            continue
        text.set_transform(axes.transAxes)
        text.set_position(axes.transAxes.inverted().transform((place.x, place.y)))
        taken.append(place.box)
        found.append(text)
        if place.distance > RADII[1] * unit:
            ends = axes.transAxes.inverted().transform([places[label], (place.x, place.y)])
            axes.plot(*ends.T, transform=axes.transAxes, color=text.get_color(), lw=0.5, alpha=0.5, zorder=1,
                      scalex=False, scaley=False)  # fmt: skip
    return found


def _best_place(
    point: np.ndarray, width: float, height: float, inside: Bbox, taken: Sequence[Bbox], unit: float, radii: Sequence[float],
    must: bool,
) -> _Place | None:  # fmt: skip
    """The nearest place of a name around a point that is free; if there must be one, the freest."""
    best, least = None, math.inf
    for radius in radii:
        for angle in ANGLES:
            cosine, sine = math.cos(angle), math.sin(angle)
            x = point[0] + radius * unit * cosine + width / 2 * float(np.sign(round(cosine, 6)))
            y = point[1] + radius * unit * sine + height / 2 * float(np.sign(round(sine, 6)))
            box = Bbox.from_bounds(x - width / 2 - PADDING * unit, y - height / 2, width + 2 * PADDING * unit, height)
            if box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1:
                continue
            covered = sum(overlap(box, other) for other in taken)
            if covered == 0:
                return _Place(box, x, y, radius * unit)
            if must and covered < least:
                best, least = _Place(box, x, y, radius * unit), covered
    return best


def overlap(one: Bbox, other: Bbox) -> float:
    """The area that two boxes share."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return width * height if width > 0 and height > 0 else 0.0
