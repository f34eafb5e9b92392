"""One line of JSON per figure, written at once: a run that is cut keeps what it had."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from moe_bench.floors import Work, floor_of

__all__ = ["Distribution", "JsonLines", "distribution_of", "figures_of", "ratio_of_rounds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Times of one layer, in microseconds.

    Attributes:
        us: Median.
        p20: 20th percentile.
        p80: 80th percentile.
        samples: How many times were taken.
    """

    us: float
    p20: float
    p80: float
    samples: int


def distribution_of(times: Sequence[float]) -> Distribution:
    """Return median and percentiles; between two samples they are interpolated.

    Args:
        times: At least two times.

    Returns:
        The distribution, rounded to nanoseconds.

    Raises:
        ValueError: There are fewer than two times.
    """
    if len(times) < 2:
        raise ValueError(f"{len(times)} times; percentiles need at least 2")
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Distribution(
        us=round(statistics.median(times), 3),
        p20=round(fifths[0], 3),
        p80=round(fifths[-1], 3),
        samples=len(times),
    )


def figures_of(us: float, work: Work) -> dict[str, object]:
    """Return what a time means beside the work: share of the floor, TB/s and TFLOP/s.

    Args:
        us: Median time of one layer.
        work: What the layer had to do.

    Returns:
        Columns of a row.
    """
    floor = floor_of(work)
    return {
        **asdict(work),
        "floor_us": round(floor.us, 3),
        "bound": floor.bound,
        "share_of_floor": round(floor.us / us, 4),
        "tb_per_s": round(work.num_bytes / us / 1e6, 4),
        "tflop_per_s": round(work.num_flops / us / 1e6, 2),
    }


def ratio_of_rounds(
    numerator: Sequence[Sequence[float]], denominator: Sequence[Sequence[float]]
) -> dict[str, float]:
    """Compare two entrants that took turns, round by round, so that drifting clocks cancel.

    Args:
        numerator: Times of each round.
        denominator: Times of the same rounds.

    Returns:
        Median, 20th and 80th percentile of the ratio of the rounds' medians.
    """
    ratios = [
        statistics.median(above) / statistics.median(below)
        for above, below in zip(numerator, denominator, strict=True)
    ]
    fifths = statistics.quantiles(ratios, n=5, method="inclusive")
    return {
        "ratio": round(statistics.median(ratios), 5),
        "p20": round(fifths[0], 5),
        "p80": round(fifths[-1], 5),
    }


class JsonLines:
    """A file of JSON lines that is complete after every line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a")

    def write(self, kind: str, **columns: object) -> None:
        """Append one line and hand it to the operating system."""
        self._file.write(json.dumps({"kind": kind, **columns}) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
