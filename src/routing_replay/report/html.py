"""The audit as one self-contained HTML page: no scripts, no fonts, nothing fetched."""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite

from jinja2 import Environment, PackageLoader, StrictUndefined

from routing_replay.errors import ConfigError
from routing_replay.report.charts import WIDTH, heat_map, layer_chart, ratio_chart
from routing_replay.report.figures import (
    audit_notes,
    figure_rows,
    layer_rows,
    ratio_histogram,
    worst_tokens,
)
from routing_replay.report.results import AuditResult

__all__ = ["render_html"]

_MINUS, _TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _number(value: float, digits: int = 3) -> str:
    """Write a number of any size, with a raised exponent where it is far from 1."""
    if value == 0 or not isfinite(value):
        return f"{value:g}"
    mantissa, power = f"{abs(value):.{digits - 1}e}".split("e")
    sign = _MINUS if value < 0 else ""
    if -3 <= int(power) <= 3:
        return f"{sign}{abs(value):.{digits}g}"
    return f"{sign}{mantissa} {_TIMES} 10{str(int(power)).translate(_SUPERSCRIPTS)}"


def _logprob(value: float) -> str:
    return f"{value:.4f}".replace("-", _MINUS)


def _percent(share: float, digits: int = 2) -> str:
    return f"{share:.{digits}%}"


def render_html(
    result: AuditResult,
    *,
    title: str,
    facts: Mapping[str, str],
    decode: Callable[[Sequence[int]], str] | None = None,
    caveats: Sequence[str] = (),
) -> str:
    """Draw an audit as one page that needs no network.

    Args:
        result: An audit with details.
        title: Heading of the page.
        facts: What was audited: model, precisions, seeds, versions.
        decode: Text of tokens; None shows their ids.
        caveats: What else a reader must know, of the rollout: shown below the figures.

    Returns:
        HTML; all text in it is escaped.

    Raises:
        ConfigError: The audit has no details.
    """
    details = result.details
    if details is None:
        raise ConfigError("result.details is None; a page needs the result of audit() as it is")
    environment = Environment(
        loader=PackageLoader("routing_replay.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, percent=_percent, logprob=_logprob)
    layers = layer_rows(result, details)
    histogram = ratio_histogram(details)
    return environment.get_template("report.html.j2").render(
        title=title,
        facts=facts,
        result=result,
        num_samples=len(details.samples),
        rows=figure_rows(result, _number),
        notes=[*audit_notes(result), *caveats],
        layers=layers,
        layer_chart=layer_chart(layers),
        ratio_chart=ratio_chart(histogram),
        bins=list(
            zip(
                histogram.edges[:-1].tolist(),
                histogram.edges[1:].tolist(),
                histogram.native.tolist(),
                histogram.replayed.tolist(),
                strict=True,
            )
        ),
        heat=heat_map(details),
        worst=worst_tokens(details, decode),
        width=WIDTH,
    )
