"""The tuner: which of many configurations is fastest, in a bounded time."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isqrt
from statistics import median
from typing import Protocol

from routing_replay.errors import ConfigError, RoutingReplayError
from routing_replay.kernels.experts.choosing import choose_config
from routing_replay.kernels.experts.config import ExpertsConfig
from routing_replay.kernels.experts.tables import ConfigTables, Device, LayerShape, TableEntry
from routing_replay.kernels.experts.tuning_candidates import candidates, in_order, with_other_tile

__all__ = ["Selection", "TunedTokens", "Workload", "select", "table_entries", "tune_layer"]

_ROUNDS = 3  # of a rung: all that are still in the running take turns
_FINAL_ROUNDS = 5
_FINAL_SAMPLES = 5
_TIE = 0.99  # what is not faster than this share of the rule's time is a tie, and the rule stays
# Shares of the budget: both GEMMs alike, then GEMM 2 alone, then GEMM 1 alone; of each, the part for compiling.
_SHARES = (0.6, 0.2, 0.2)
_ADMISSION = 0.75


class Workload(Protocol):
    """Runs of one layer shape with one number of tokens."""

    def refusal(self, config: ExpertsConfig) -> str | None:
        """Compile and run a configuration once, and say why it must not be used; None where it is right."""
        ...

    def sample_us(self, config: ExpertsConfig, num_samples: int) -> Sequence[float]:
        """Time a configuration that was not refused: microseconds of a layer, `num_samples` of them."""
        ...

    def release(self, config: ExpertsConfig) -> None:
        """Free what is held for a configuration; it may come again."""
        ...


@dataclass(slots=True)
class _Timed:
    config: ExpertsConfig
    samples: list[float] = field(default_factory=list[float])

    @property
    def median_us(self) -> float:
        return median(self.samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What came of trying configurations.

    Attributes:
        best: The fastest.
        num_timed: How many were timed.
        refused: Those that must not be used, and why.
    """

    best: ExpertsConfig
    num_timed: int
    refused: tuple[tuple[ExpertsConfig, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedTokens:
    """What came of tuning for one number of tokens.

    Attributes:
        num_tokens: T.
        config: The configuration to use: the fastest, or the rule's where that is as fast.
        microseconds: Its median.
        rule_config: What the rule has.
        rule_microseconds: Its median, measured in turns with the other.
        num_timed: How many configurations were timed.
        refused: Those that failed to compile or gave a wrong result, and why.
    """

    num_tokens: int
    config: ExpertsConfig
    microseconds: float
    rule_config: ExpertsConfig
    rule_microseconds: float
    num_timed: int
    refused: tuple[tuple[ExpertsConfig, str], ...]


def _take_turns(runs: Sequence[_Timed], workload: Workload, *, rounds: int, samples: int) -> None:
    for _ in range(rounds):
        for run in runs:
            run.samples.extend(workload.sample_us(run.config, samples))


def select(
    configs: Sequence[ExpertsConfig],
    workload: Workload,
    *,
    deadline: float,
    clock: Callable[[], float],
) -> Selection:
    """Find the fastest configuration by successive halving: the slower half leaves, the others get twice the samples.

    Args:
        configs: What to try, most promising first; the first is tried even where no time is left.
        workload: What runs and times them.
        deadline: When to stop, in seconds of `clock`; what leads then is the best.
        clock: The time.

    Returns:
        The outcome.

    Raises:
        RoutingReplayError: Every configuration that was tried was refused.
    """
    started = clock()
    admission_ends = started + _ADMISSION * (deadline - started)
    running: list[_Timed] = []
    refused: list[tuple[ExpertsConfig, str]] = []
    for config in configs:
        if running and clock() >= admission_ends:
            break
        reason = workload.refusal(config)
        if reason is None:
            running.append(_Timed(config))
        else:
            refused.append((config, reason))
    if not running:
        raise RoutingReplayError(
            f"none of {len(refused)} configurations can be used; the first, {refused[0][0]}: {refused[0][1]}"
        )
    num_timed, samples = len(running), 1
    while len(running) > 1:
        _take_turns(running, workload, rounds=_ROUNDS, samples=samples)
        running.sort(key=lambda run: run.median_us)
        keep = 1 if clock() >= deadline else len(running) // 2
        for run in running[keep:]:
            workload.release(run.config)
        del running[keep:]
        samples *= 2
    return Selection(best=running[0].config, num_timed=num_timed, refused=tuple(refused))


def _require(config: ExpertsConfig, workload: Workload) -> None:
    """Refuse to go on without a configuration that everything is compared with."""
    reason = workload.refusal(config)
    if reason is not None:
        raise RoutingReplayError(f"{config} cannot be used: {reason}")


def _tune_tokens(
    layer: LayerShape,
    num_tokens: int,
    device: Device,
    workload: Workload,
    *,
    deadline: float,
    seed: int,
    clock: Callable[[], float],
) -> TunedTokens:
    shape = layer.with_tokens(num_tokens)
    rule = choose_config(shape, capability=device.capability, tables=ConfigTables())
    _require(rule, workload)
    started, best = clock(), rule
    num_timed, refused = 0, dict[ExpertsConfig, str]()
    elapsed_share = 0.0
    for share, gemm in zip(_SHARES, (None, "gemm2", "gemm1"), strict=True):
        elapsed_share += share
        found = (
            candidates(shape, device.capability)
            if gemm is None
            else with_other_tile(best, gemm, shape, device.capability)
        )
        chosen = select(
            in_order(found, seed),
            workload,
            deadline=started + elapsed_share * (deadline - started),
            clock=clock,
        )
        best = chosen.best
        num_timed += chosen.num_timed
        refused.update(chosen.refused)
    finalists = [_Timed(rule)] if best == rule else [_Timed(rule), _Timed(best)]
    for run in finalists:
        _require(run.config, workload)  # either may have been released since it was last checked
    _take_turns(finalists, workload, rounds=_FINAL_ROUNDS, samples=_FINAL_SAMPLES)
    by_rule, winner = finalists[0], finalists[-1]
    if winner.median_us > _TIE * by_rule.median_us:
        winner = by_rule
    for run in finalists:
        workload.release(run.config)
    return TunedTokens(
        num_tokens=num_tokens,
        config=winner.config,
        microseconds=winner.median_us,
        rule_config=rule,
        rule_microseconds=by_rule.median_us,
        num_timed=num_timed,
        refused=tuple(refused.items()),
    )


def tune_layer(
    layer: LayerShape,
    tokens: Sequence[int],
    device: Device,
    workloads: Callable[[int], Workload],
    *,
    budget_seconds: float,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[TunedTokens]:
    """Tune a layer for several numbers of tokens.

    Args:
        layer: The layer.
        tokens: Numbers of tokens, ascending.
        device: What it runs on.
        workloads: Gives what runs and times it with so many tokens.
        budget_seconds: Time for all of them; each takes an equal share of what is left, and about a second more.
        seed: Of the order of candidates.
        clock: The time, in seconds.

    Yields:
        The outcome for each number of tokens, as soon as it is known.

    Raises:
        ConfigError: The numbers do not ascend from 1 or more, or the budget is not positive.
        RoutingReplayError: What the rule has cannot be used.
    """
    if not tokens or tokens[0] < 1 or any(a >= b for a, b in pairwise(tokens)):
        raise ConfigError(
            f"tokens={list(tokens)}; accepted are numbers of 1 or more, each larger than the one before"
        )
    if not budget_seconds > 0:
        raise ConfigError(f"budget_seconds={budget_seconds}; accepted is a number above 0")
    end = clock() + budget_seconds
    for index, num_tokens in enumerate(tokens):
        now = clock()
        deadline = now + max(0.0, end - now) / (len(tokens) - index)
        yield _tune_tokens(
            layer,
            num_tokens,
            device,
            workloads(num_tokens),
            deadline=deadline,
            seed=seed,
            clock=clock,
        )


def table_entries(tuned: Sequence[TunedTokens]) -> tuple[TableEntry, ...]:
    """Decide for which numbers of tokens each outcome is used.

    Between two measured numbers the border is their geometric mean; no entry reaches beyond half or twice its own number,
    so that a gap in the measurements is left to the rule.

    Args:
        tuned: Outcomes, ascending.

    Returns:
        Entries of a table.
    """
    numbers = [item.num_tokens for item in tuned]
    entries: list[TableEntry] = []
    for index, item in enumerate(tuned):
        least, most = -(-item.num_tokens // 2), 2 * item.num_tokens
        if index:
            least = max(least, isqrt(numbers[index - 1] * item.num_tokens) + 1)
        if index + 1 < len(numbers):
            most = min(most, isqrt(item.num_tokens * numbers[index + 1]))
        entries.append(
            TableEntry(
                min_tokens=least,
                max_tokens=most,
                measured_tokens=item.num_tokens,
                config=item.config,
                microseconds=round(item.microseconds, 2),
                rule_microseconds=round(item.rule_microseconds, 2),
            )
        )
    return tuple(entries)
