"""Put the entrants side by side on one shape and one number of tokens: gate, then rounds in turn."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from math import inf, isnan, nan

import torch

from moe_bench.data import (
    LayerInput,
    LayerWeights,
    expected_output,
    layer_inputs,
    relative_l2,
    work_of_inputs,
)
from moe_bench.graphs import Captured, Timer, profiled
from moe_bench.peers.contract import Configuration, LayerCall, Peer
from moe_bench.rows import distribution_of, figures_of, ratio_of_rounds
from moe_bench.shapes import LayerShape

__all__ = ["Case", "Options", "compare", "in_turns", "run_once"]

LARGEST_ERROR = 1e-2
"""Relative L2 distance from float32 that passes; torch's own bfloat16 path stays below 9e-3."""

_TUNING_LAYERS = 2
_TUNING_RUNS = 6
_WARM_UP_RUNS = 2

Report = Callable[..., None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a case is measured.

    Attributes:
        rounds: Turns of every entrant.
        runs: Timed runs in a turn.
        zipf: Exponent of a skewed load, or 0.
        is_profiled: Mark the timed region for a profiler.
        device: Where everything is.
    """

    rounds: int = 6
    runs: int = 5
    zipf: float = 0.0
    is_profiled: bool = False
    device: str = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One shape, one number of tokens.

    Attributes:
        shape: The layer.
        num_tokens: T.
        weights: Of all copies of the layer.
    """

    shape: LayerShape
    num_tokens: int
    weights: Sequence[LayerWeights]

    def inputs(self, options: Options, layers: int | None = None) -> list[LayerInput]:
        """Return the layers' inputs, the same at every call."""
        count = self.shape.layers(self.num_tokens) if layers is None else layers
        return layer_inputs(
            self.shape,
            self.num_tokens,
            min(count, len(self.weights)),
            seed=7 + self.num_tokens,
            zipf=options.zipf,
            device=options.device,
        )

    def calls(
        self, peer: Peer, inputs: Sequence[LayerInput], configuration: Configuration
    ) -> list[LayerCall]:
        """Bind an entrant to all layers."""
        return [
            peer.layer(self.shape, given, weights, configuration)
            for given, weights in zip(inputs, self.weights, strict=False)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entrant:
    """A peer that is timed; `calls` own tensors that the recorded kernels read, and must live as long as they run."""

    peer: Peer
    configuration: Configuration
    calls: Sequence[LayerCall]
    captured: Captured
    error: float


def compare(case: Case, peers: Iterable[Peer], timer: Timer, options: Options, report: Report) -> None:  # fmt: skip
    """Measure all peers on a case and report one row each.

    Args:
        case: What is measured.
        peers: The entrants.
        timer: What records and times.
        options: How it is measured.
        report: Called with a kind (`layer`, `ratio`, `refused`, `failed`, `wrong`) and columns.
    """
    inputs = case.inputs(options)
    expected = [
        expected_output(given, weights)
        for given, weights in zip(inputs, case.weights, strict=False)
    ]
    where = {"shape": case.shape.name, "tokens": case.num_tokens, "zipf": options.zipf}

    def tell(kind: str, peer: Peer, **columns: object) -> None:
        report(kind, **where, peer=peer.name, **columns)

    entrants: list[_Entrant] = []
    for peer in peers:
        reason = peer.refusal(case.shape, case.num_tokens)
        if reason is not None:
            tell("refused", peer, reason=reason)
            continue
        try:
            entrant = _entered(case, peer, inputs, expected, timer, tell)
        except Exception as err:  # whatever a peer raises is its row
            tell("failed", peer, reason=_one_line(err))
            continue
        if entrant is not None:
            entrants.append(entrant)
    with profiled(options.is_profiled):
        graphs = [entrant.captured for entrant in entrants]
        turns = in_turns(graphs, rounds=options.rounds, runs=options.runs)
    work = work_of_inputs(case.shape, inputs)
    for entrant, rounds in zip(entrants, turns, strict=True):
        times = [time / len(inputs) for turn in rounds for time in turn]
        distribution = distribution_of(times)
        tell(
            "layer",
            entrant.peer,
            **asdict(distribution),
            **figures_of(distribution.us, work),
            configuration=entrant.configuration.label,
            values=dict(entrant.configuration.values),
            layers=len(inputs),
            relative_l2=float(f"{entrant.error:.3g}"),
            times_us=[round(time, 2) for time in times],
        )
    _report_recording(entrants, turns, tell)


def run_once(case: Case, peer: Peer, options: Options) -> list[str]:
    """Run every configuration of a peer once, on one layer, so that its kernels get built.

    Args:
        case: What will be measured; its weights may hold anything.
        peer: The entrant.
        options: How it will be measured.

    Returns:
        What failed.
    """
    if peer.refusal(case.shape, case.num_tokens) is not None:
        return []
    problems: list[str] = []
    inputs = case.inputs(options, layers=1)
    for configuration in peer.configurations(case.shape, case.num_tokens):
        try:
            for call in case.calls(peer, inputs, configuration):
                call.run()
        except Exception as err:  # reported again, and counted, when it is measured
            problems.append(f"{peer.name} {configuration.label}: {_one_line(err)}")
    return problems


def _entered(
    case: Case,
    peer: Peer,
    inputs: Sequence[LayerInput],
    expected: Sequence[torch.Tensor],
    timer: Timer,
    tell: Report,
) -> _Entrant | None:
    """Choose a configuration, record the layers, and let them through the gate."""
    configuration = _fastest(case, peer, inputs, timer, tell)
    calls = case.calls(peer, inputs, configuration)
    captured = timer.capture([call.run for call in calls])
    error = _gate(captured, calls, inputs, expected)
    if not error < LARGEST_ERROR:
        tell("wrong", peer, reason=f"relative L2 {error:.3g}, at most {LARGEST_ERROR}", configuration=configuration.label)  # fmt: skip
        return None
    return _Entrant(peer=peer, configuration=configuration, calls=calls, captured=captured, error=error)  # fmt: skip


def _fastest(
    case: Case, peer: Peer, inputs: Sequence[LayerInput], timer: Timer, tell: Report
) -> Configuration:
    """Return the configuration that wins a short round on two layers."""
    choices = peer.configurations(case.shape, case.num_tokens)
    if len(choices) == 1:
        return choices[0]
    found: list[tuple[float, Configuration]] = []
    for choice in choices:
        try:
            calls = case.calls(peer, inputs[:_TUNING_LAYERS], choice)
            captured = timer.capture([call.run for call in calls])
            time = distribution_of(captured.times(_TUNING_RUNS)).us
        except Exception as err:  # one tile may not fit; the others still count
            tell("failed", peer, reason=_one_line(err), configuration=choice.label)
            continue
        found.append((time, choice))
    if not found:
        raise RuntimeError("no configuration runs")
    return min(found, key=lambda item: item[0])[1]


def _gate(
    captured: Captured,
    calls: Sequence[LayerCall],
    inputs: Sequence[LayerInput],
    expected: Sequence[torch.Tensor],
) -> float:
    """Return the largest error of a layer; infinity where recorded ids are not the reference's, position by position."""
    for output, call in zip(captured.outputs, calls, strict=True):
        output.fill_(nan)
        if call.recorded is not None:
            call.recorded.fill_(-1)
    captured.replay()
    errors = [
        relative_l2(output, wanted)
        for output, wanted in zip(captured.outputs, expected, strict=True)
    ]
    if any(isnan(error) for error in errors):
        return nan
    for call, given in zip(calls, inputs, strict=True):
        if call.recorded is not None and not torch.equal(call.recorded.long(), given.topk_ids):
            return inf
    return max(errors)


def in_turns(captured: Sequence[Captured], *, rounds: int, runs: int) -> list[list[list[float]]]:
    """Time entrants in turn, every other round backwards, so that none always follows the same one.

    Args:
        captured: The entrants.
        rounds: Turns of each.
        runs: Timed runs in a turn.

    Returns:
        Microseconds of each run, by entrant and round.
    """
    for item in captured:
        item.times(_WARM_UP_RUNS)
    times: list[list[list[float]]] = [[] for _ in captured]
    order = list(range(len(captured)))
    for index in range(rounds):
        for place in order if index % 2 == 0 else reversed(order):
            times[place].append(captured[place].times(runs))
    return times


def _report_recording(
    entrants: Sequence[_Entrant], turns: Sequence[Sequence[Sequence[float]]], tell: Report
) -> None:
    """Report what recording costs where both forms ran."""
    places = {entrant.peer.name: place for place, entrant in enumerate(entrants)}
    if {"ours", "ours_recording"} <= places.keys():
        recording, plain = places["ours_recording"], places["ours"]
        ratio = ratio_of_rounds(turns[recording], turns[plain])
        tell("ratio", entrants[recording].peer, over="ours", **ratio)


def _one_line(err: Exception) -> str:
    return f"{type(err).__name__}: {' '.join(str(err).split())}"[:400]
