"""The audit as tables for a terminal of 80 columns or more."""

from collections.abc import Callable, Sequence

import numpy as np
from rich.table import Table
from rich.text import Text

from routing_replay.report.figures import (
    figure_rows,
    layer_rows,
    ratio_histogram,
    worst_tokens,
)
from routing_replay.report.results import AuditDetails, AuditResult

__all__ = ["audit_tables"]

_SHADES = " ▁▂▃▄▅▆▇█"
_LOAD_GROUPS = 12
_TEXT_BEFORE, _TEXT_AFTER = 15, 8


def _blocks(values: Sequence[float]) -> str:
    """Draw values as a row of blocks, the largest one full, and the smallest that is not 0 visible."""
    top = max(values, default=0.0) or 1.0
    heights = [value / top * (len(_SHADES) - 1) for value in values]
    return "".join(_SHADES[max(round(height), 1 if height else 0)] for height in heights)


def _titled(title: str) -> Table:
    return Table(title=title, title_justify="left")


def _figures(result: AuditResult) -> Table:
    table = _titled("trainer against rollout; control: trainer against itself")
    table.add_column("")
    for name in ("native", "replayed", "control"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in figure_rows(result):
        table.add_row(*row)
    return table


def _layers(result: AuditResult, details: AuditDetails) -> Table:
    table = _titled("routing mismatch per layer, and expert load, busiest experts first")
    for name in ("layer", "native", "replayed", "in common", "most used expert", "unused"):
        table.add_column(name, justify="right")
    table.add_column("load", no_wrap=True)
    for row, load in zip(layer_rows(result, details), details.expert_load, strict=True):
        busiest = np.sort(load)[::-1]
        groups = np.array_split(busiest, min(_LOAD_GROUPS, len(busiest)))
        table.add_row(
            str(row.layer_idx),
            f"{row.native:.2%}",
            f"{row.replayed:.2%}",
            f"{row.overlap:.2%}",
            f"{row.busiest} ({row.busiest_share:.1%})",
            str(row.num_unused),
            _blocks([float(part.mean()) for part in groups]),
        )
    return table


def _ratios(details: AuditDetails) -> Table:
    histogram = ratio_histogram(details, num_bins=41)
    table = _titled("log probability ratio, trainer over rollout; heights: log of counts")
    table.add_column("")
    left, right = f"{histogram.edges[0]:+.3g}", f"{histogram.edges[-1]:+.3g}"
    width = len(histogram.native)
    middle = width // 2
    axis = left.ljust(middle) + "0" + right.rjust(width - middle - 1)
    table.add_column(axis, no_wrap=True)
    for name, counts in (("native", histogram.native), ("replayed", histogram.replayed)):
        table.add_row(name, _blocks(np.log1p(counts).tolist()))
    return table


def _worst(details: AuditDetails, decode: Callable[[Sequence[int]], str] | None) -> Table:
    table = _titled("tokens with the largest difference, natively, and layers routed otherwise")
    table.add_column("token", no_wrap=True)
    table.add_column("text", overflow="ellipsis", no_wrap=True, max_width=25)
    for name in ("rollout", "native", "replayed", "layers"):
        table.add_column(name, justify="right", no_wrap=True)
    for token in worst_tokens(details, decode, count=8):
        text = Text(token.before[-_TEXT_BEFORE:].replace("\n", "⏎"))
        text.append(token.token.replace("\n", "⏎"), style="reverse")
        text.append(token.after[:_TEXT_AFTER].replace("\n", "⏎"))
        table.add_row(
            f"{token.sample}:{token.position}",
            text,
            f"{token.rollout:.4f}",
            f"{token.native:.4f}",
            f"{token.replayed:.4f}",
            str(len(token.other_layers)),
        )
    return table


def audit_tables(
    result: AuditResult, decode: Callable[[Sequence[int]], str] | None = None
) -> list[Table]:
    """Return an audit as tables.

    Args:
        result: The audit.
        decode: Text of tokens; None shows their ids.

    Returns:
        The figures; with details also layers, ratios and the worst tokens.
    """
    tables = [_figures(result)]
    if result.details is not None:
        details = result.details
        tables += [_layers(result, details), _ratios(details), _worst(details, decode)]
    return tables
