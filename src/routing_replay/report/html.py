"""The audit as one self-contained HTML page: no scripts, no fonts, nothing fetched."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log10

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from routing_replay.report.audit import AuditDetails, AuditResult
from routing_replay.report.figures import figure_rows, ratio_histogram, worst_tokens

__all__ = ["render_html"]

_WIDTH = 720.0
_BARS_HEIGHT = 180.0
_HISTOGRAM_HEIGHT = 200.0
_MOST_CELLS = 128


@dataclass(frozen=True, slots=True)
class _Bar:
    """A rectangle of a chart, in its coordinates, and what it says when pointed at."""

    x: float
    y: float
    width: float
    height: float
    title: str
    label: str = ""


@dataclass(frozen=True, slots=True)
class _Cell:
    """A cell of the heat map; opacity in [0, 1]."""

    x: float
    y: float
    width: float
    height: float
    opacity: float
    title: str


def _layer_bars(result: AuditResult, details: AuditDetails) -> tuple[list[_Bar], float]:
    shares = result.native.mismatch_per_layer
    top = max(*shares, 1e-4)
    step = _WIDTH / len(shares)
    every = -(-len(shares) // 24)  # as many labels as fit
    bars: list[_Bar] = []
    for slot, (layer_idx, share) in enumerate(zip(details.layer_ids, shares, strict=True)):
        height = share / top * _BARS_HEIGHT
        title = f"layer {layer_idx}: {share:.2%} native, {result.replayed.mismatch_per_layer[slot]:.2%} replayed"
        label = str(layer_idx) if slot % every == 0 else ""
        bars.append(
            _Bar(slot * step + step * 0.15, _BARS_HEIGHT - height, step * 0.7, height, title, label)
        )
    return bars, top


def _heat_map(details: AuditDetails) -> tuple[list[_Cell], float, int, float]:
    """Cells of expert load over its mean; many experts share a cell."""
    load = details.expert_load
    num_layers, num_experts = load.shape
    group = -(-num_experts // _MOST_CELLS)
    starts = np.arange(0, num_experts, group)
    sums = np.add.reduceat(load, starts, axis=1) / np.diff(np.append(starts, num_experts))
    relative = sums / np.maximum(load.mean(axis=1, keepdims=True), 1e-12)
    top = max(2.0, float(relative.max()))
    height = max(8.0, min(24.0, 320.0 / num_layers))
    width = _WIDTH / len(starts)
    cells: list[_Cell] = []
    for slot in range(num_layers):
        for column, start in enumerate(starts.tolist()):
            last = min(start + group, num_experts) - 1
            name = f"expert {start}" if last == start else f"experts {start} to {last}"
            value = float(relative[slot, column])
            cells.append(
                _Cell(
                    column * width,
                    slot * height,
                    width,
                    height - 1,
                    value / top,
                    f"layer {details.layer_ids[slot]}, {name}: {value:.2f} x the mean",
                )
            )
    return cells, height, group, top


def _histogram_bars(details: AuditDetails) -> tuple[list[_Bar], list[_Bar], float]:
    """Native and replayed counts side by side, on a log scale; also the reach of the axis."""
    histogram = ratio_histogram(details)
    top = log10(max(int(histogram.native.max()), int(histogram.replayed.max()), 1) + 1)
    step = _WIDTH / len(histogram.native)
    series: list[list[_Bar]] = []
    for offset, name, counts in (
        (0.06, "native", histogram.native),
        (0.5, "replayed", histogram.replayed),
    ):
        bars: list[_Bar] = []
        for index, count in enumerate(counts.tolist()):
            if count == 0:
                continue
            height = log10(count + 1) / top * _HISTOGRAM_HEIGHT
            low, high = histogram.edges[index], histogram.edges[index + 1]
            title = f"{name}: {count} tokens with log ratio {low:+.4f} to {high:+.4f}"
            bars.append(
                _Bar(
                    (index + offset) * step, _HISTOGRAM_HEIGHT - height, step * 0.44, height, title
                )
            )
        series.append(bars)
    return series[0], series[1], float(histogram.edges[-1])


def render_html(
    result: AuditResult,
    *,
    title: str,
    facts: Mapping[str, str],
    decode: Callable[[Sequence[int]], str] | None = None,
) -> str:
    """Draw an audit as one page that needs no network.

    Args:
        result: An audit with details.
        title: Heading of the page.
        facts: What was audited: model, precisions, versions.
        decode: Text of tokens; None shows their ids.

    Returns:
        HTML; all text in it is escaped.
    """
    details = result.details
    assert details is not None
    environment = Environment(
        loader=PackageLoader("routing_replay.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    layer_bars, layer_top = _layer_bars(result, details)
    cells, cell_height, group, heat_top = _heat_map(details)
    native_bars, replayed_bars, reach = _histogram_bars(details)
    return environment.get_template("report.html.j2").render(
        title=title,
        facts=facts,
        result=result,
        rows=figure_rows(result),
        is_exact=result.num_wrong_ids == 0 and result.coverage == 1.0,
        layer_bars=layer_bars,
        layer_top=layer_top,
        cells=cells,
        heat_top=heat_top,
        heat_height=cell_height * len(details.layer_ids),
        cell_height=cell_height,
        layer_ids=details.layer_ids,
        experts_per_cell=group,
        native_bars=native_bars,
        replayed_bars=replayed_bars,
        reach=reach,
        worst=worst_tokens(details, decode),
        num_samples=len(details.samples),
        width=_WIDTH,
        bars_height=_BARS_HEIGHT,
        histogram_height=_HISTOGRAM_HEIGHT,
    )
