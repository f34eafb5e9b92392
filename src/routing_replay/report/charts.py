"""The shapes of the charts: numbers to coordinates, nothing about how they look."""

from dataclasses import dataclass
from math import ceil, floor, log2, log10

import numpy as np

from routing_replay.report.figures import Histogram, LayerRow
from routing_replay.report.results import AuditDetails

__all__ = [
    "WIDTH",
    "Bar",
    "BarChart",
    "Cell",
    "HeatMap",
    "Tick",
    "heat_map",
    "layer_chart",
    "ratio_chart",
]

WIDTH = 720.0
"""Width of every chart, in its own units."""

_BARS_HEIGHT = 170.0
_HISTOGRAM_HEIGHT = 210.0
_HEAT_HEIGHT = 320.0
_MOST_COLUMNS = 128
_MOST_LABELS = 24


@dataclass(frozen=True, slots=True)
class Bar:
    """A rectangle, and what it says when pointed at."""

    series: str
    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True, slots=True)
class Tick:
    """A label at a place on an axis."""

    at: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BarChart:
    """Bars of two series above one axis.

    Attributes:
        height: Height of the plot.
        bars: The bars.
        x_ticks: Labels below.
        y_ticks: Labels and lines on the left.
        marks: Vertical lines inside the plot.
    """

    height: float
    bars: tuple[Bar, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Tick, ...] = ()


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of the heat map: above (`over`) or below (`under`) the mean by a share of the scale in [0, 1]."""

    x: float
    y: float
    side: str
    share: float
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """Expert load over the mean of its layer, on a logarithmic scale.

    Attributes:
        height: Height of all rows.
        cell_width: Width of a cell.
        cell_height: Height of a cell.
        cells: The cells.
        y_ticks: Decoder layers.
        experts_per_cell: How many experts a cell stands for.
        reach: Load over the mean at full colour; its inverse on the other side.
    """

    height: float
    cell_width: float
    cell_height: float
    cells: tuple[Cell, ...]
    y_ticks: tuple[Tick, ...]
    experts_per_cell: int
    reach: float


def _round_up(value: float) -> float:
    """Return the next of 1, 2, 5 times a power of ten."""
    scale = 10.0 ** floor(log10(value))
    return next(step * scale for step in (1, 2, 5, 10) if step * scale >= value * (1 - 1e-9))


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "\N{MINUS SIGN}") if value else "0"


def layer_chart(rows: list[LayerRow]) -> BarChart:
    """Draw the share of tokens routed otherwise, natively and replayed, of every layer.

    Args:
        rows: One for each MoE layer.

    Returns:
        Two bars for each layer.
    """
    top = _round_up(max(*(row.native for row in rows), *(row.replayed for row in rows), 1e-4))
    step = WIDTH / len(rows)
    every = ceil(len(rows) / _MOST_LABELS)
    bars: list[Bar] = []
    for slot, row in enumerate(rows):
        series = (("native", row.native), ("replayed", row.replayed))
        for offset, (name, share) in zip((0.16, 0.52), series, strict=True):
            height = share / top * _BARS_HEIGHT
            title = f"layer {row.layer_idx}, {name}: {share:.2%} of tokens"
            x = (slot + offset) * step
            bars.append(Bar(name, x, _BARS_HEIGHT - height, step * 0.32, height, title))
    ticks = [
        Tick((slot + 0.5) * step, str(row.layer_idx))
        for slot, row in enumerate(rows)
        if slot % every == 0
    ]
    shares = (0.0, 0.5, 1.0)
    y_ticks = tuple(
        Tick(_BARS_HEIGHT * (1 - share), f"{100 * top * share:.3g} %") for share in shares
    )
    return BarChart(height=_BARS_HEIGHT, bars=tuple(bars), x_ticks=tuple(ticks), y_ticks=y_ticks)


def ratio_chart(histogram: Histogram) -> BarChart:
    """Draw counts of log probability ratios, before and after replay, on a logarithmic scale.

    Args:
        histogram: The counts.

    Returns:
        Two bars for each bin that is not empty; lines where the probability is off by a factor of 2.
    """
    most = max(int(histogram.native.max()), int(histogram.replayed.max()), 1)
    top = log10(most + 1)
    step = WIDTH / len(histogram.native)
    reach = float(histogram.edges[-1])
    bars: list[Bar] = []
    for offset, name, counts in (
        (0.06, "native", histogram.native),
        (0.5, "replayed", histogram.replayed),
    ):
        for index, count in enumerate(counts.tolist()):
            if count:
                height = log10(count + 1) / top * _HISTOGRAM_HEIGHT
                low, high = histogram.edges[index], histogram.edges[index + 1]
                title = f"{name}: {count} tokens from {low:+.3g} to {high:+.3g}"
                x = (index + offset) * step
                bars.append(Bar(name, x, _HISTOGRAM_HEIGHT - height, step * 0.44, height, title))
    x_ticks = tuple(
        Tick(WIDTH * (share + 1) / 2, _signed(reach * share))
        for share in (-1.0, -0.5, 0.0, 0.5, 1.0)
    )
    powers = (10**power for power in range(floor(log10(most)) + 1))
    y_ticks = (
        Tick(_HISTOGRAM_HEIGHT, ""),
        *(Tick(_HISTOGRAM_HEIGHT * (1 - log10(count + 1) / top), f"{count:,}") for count in powers),
    )
    factor = float(np.log(2))
    marks = tuple(
        Tick(WIDTH * (sign * factor / reach + 1) / 2, label)
        for sign, label in ((-1, "½"), (1, "2 x"))
        if factor < reach
    )
    return BarChart(
        height=_HISTOGRAM_HEIGHT, bars=tuple(bars), x_ticks=x_ticks, y_ticks=y_ticks, marks=marks
    )


def heat_map(details: AuditDetails) -> HeatMap:
    """Draw how often each expert was picked, over the mean of its layer.

    Args:
        details: Of an audit.

    Returns:
        A row of cells for each layer; full colour is at twice the mean and half of it, or at what is further away.
    """
    load = details.expert_load
    num_layers, num_experts = load.shape
    group = ceil(num_experts / _MOST_COLUMNS)
    starts = np.arange(0, num_experts, group)
    sizes = np.diff(np.append(starts, num_experts))
    relative = np.add.reduceat(load, starts, axis=1) / sizes
    relative = relative / np.maximum(load.mean(axis=1, keepdims=True), 1e-12)
    used = relative[relative > 0]
    reach = max(1.0, float(np.abs(np.log2(used)).max(initial=0.0)))
    height = max(8.0, min(24.0, _HEAT_HEIGHT / num_layers))
    width = WIDTH / len(starts)
    cells: list[Cell] = []
    for slot, layer_idx in enumerate(details.layer_ids):
        for column, start in enumerate(starts.tolist()):
            last = start + int(sizes[column]) - 1
            name = f"expert {start}" if last == start else f"experts {start} to {last}"
            value = float(relative[slot, column])
            # An expert that was never picked is as far below the mean as the scale goes.
            away = log2(value) if value else -reach
            title = f"layer {layer_idx}, {name}: {value:.2f} x the mean"
            side = "over" if away > 0 else "under"
            cells.append(Cell(column * width, slot * height, side, abs(away) / reach, title))
    every = 1 if height >= 14 else 2
    y_ticks = tuple(
        Tick((slot + 0.5) * height, str(layer_idx))
        for slot, layer_idx in enumerate(details.layer_ids)
        if slot % every == 0
    )
    return HeatMap(
        height=num_layers * height,
        cell_width=width,
        cell_height=height,
        cells=tuple(cells),
        y_ticks=y_ticks,
        experts_per_cell=group,
        reach=2.0**reach,
    )
