"""The audit as tables for a terminal."""

from collections.abc import Callable, Sequence

import numpy as np
from rich.table import Table
from rich.text import Text

from routing_replay.report.audit import AuditResult
from routing_replay.report.figures import figure_rows, ratio_histogram, worst_tokens

__all__ = ["audit_tables"]

_SHADES = " ▁▂▃▄▅▆▇█"


def _bar(values: Sequence[float]) -> str:
    """Draw values as a row of blocks, the largest one full."""
    top = max(values, default=0.0) or 1.0
    return "".join(_SHADES[round(value / top * (len(_SHADES) - 1))] for value in values)


def _figures(result: AuditResult) -> Table:
    table = Table(title="trainer against rollout", title_justify="left")
    table.add_column("")
    for name in ("native", "replayed", "control"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in figure_rows(result):
        table.add_row(*row)
    return table


def _layers(result: AuditResult) -> Table:
    table = Table(
        title="routing mismatch and expert load (busiest first) per layer", title_justify="left"
    )
    for name in ("layer", "native", "replayed", "most used expert", "unused"):
        table.add_column(name, justify="right")
    table.add_column("load", no_wrap=True)
    details = result.details
    assert details is not None
    for slot, layer_idx in enumerate(details.layer_ids):
        load = details.expert_load[slot]
        share = load / max(1, load.sum())
        busiest = np.sort(share)[::-1]
        groups = [float(part.mean()) for part in np.array_split(busiest, min(12, len(busiest)))]
        table.add_row(
            str(layer_idx),
            f"{result.native.mismatch_per_layer[slot]:.2%}",
            f"{result.replayed.mismatch_per_layer[slot]:.2%}",
            f"{int(load.argmax())} ({share.max():.1%})",
            str(int((load == 0).sum())),
            _bar(groups),
        )
    return table


def _ratios(result: AuditResult) -> Table:
    assert result.details is not None
    histogram = ratio_histogram(result.details, num_bins=31)
    table = Table(
        title="log probability ratio, trainer over rollout (log of counts)", title_justify="left"
    )
    table.add_column("")
    table.add_column(f"{histogram.edges[0]:+.3f} … 0 … {histogram.edges[-1]:+.3f}")
    for name, counts in (("native", histogram.native), ("replayed", histogram.replayed)):
        table.add_row(name, _bar(np.log1p(counts).tolist()))
    return table


def _worst(result: AuditResult, decode: Callable[[Sequence[int]], str] | None) -> Table:
    table = Table(title="tokens with the largest difference, natively", title_justify="left")
    table.add_column("sample:token", no_wrap=True)
    table.add_column("text", overflow="ellipsis", no_wrap=True)
    for name in ("rollout", "native", "replayed", "layers"):
        table.add_column(name, justify="right", no_wrap=True, min_width=7)
    assert result.details is not None
    for token in worst_tokens(result.details, decode, count=8):
        text = Text(token.before[-16:].replace("\n", "⏎"))
        text.append(token.token.replace("\n", "⏎"), style="reverse")
        text.append(token.after[:8].replace("\n", "⏎"))
        table.add_row(
            f"{token.sample}:{token.position}",
            text,
            f"{token.rollout:.4f}",
            f"{token.native:.4f}",
            f"{token.replayed:.4f}",
            str(token.num_other_layers),
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
        tables += [_layers(result), _ratios(result), _worst(result, decode)]
    return tables
