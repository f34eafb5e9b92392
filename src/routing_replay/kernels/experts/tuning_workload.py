"""What the tuner runs: copies of a layer with cold weights, checked against the reference, as one CUDA graph."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from routing_replay.errors import ConfigError
from routing_replay.kernels.backend import Backend
from routing_replay.kernels.experts.activation import ActivationType
from routing_replay.kernels.experts.config import ExpertsConfig
from routing_replay.kernels.experts.tables import Device, LayerShape
from routing_replay.kernels.fused_moe import bf16_moe
from routing_replay.kernels.routing import RoutingMethodType

__all__ = [
    "CheckedRuns",
    "GraphWorkload",
    "LayerCopies",
    "LayerWeights",
    "Step",
    "cuda_device",
    "num_copies",
    "run_step",
]

# A sweep over the copies touches this many times the L2 cache, so that no copy finds its weights there.
_L2_SIZES = 4
_MOST_COPIES = 256
# Relative error in the 2-norm; bfloat16 roundings alone give about 4e-3.
_MOST_ERROR = 1e-2
_WEIGHT_SCALE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerWeights:
    """One copy of a layer.

    Attributes:
        gemm1_weights: bfloat16 `[E_local, 2I, H]` (or `[E_local, I, H]`).
        gemm2_weights: bfloat16 `[E_local, H, I]`.
    """

    gemm1_weights: Tensor
    gemm2_weights: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """What a copy computes: its own tokens and its own routing.

    Attributes:
        weights: Of the copy.
        routing_logits: float32 `[T, E]`.
        hidden_states: bfloat16 `[T, H]`.
        output: bfloat16 `[T, H]`, overwritten.
    """

    weights: LayerWeights
    routing_logits: Tensor
    hidden_states: Tensor
    output: Tensor


RunStep = Callable[[LayerShape, Step, ExpertsConfig | None], None]
"""Runs a step with a configuration, or with the reference where that is None."""


def cuda_device(index: int) -> tuple[Device, int]:
    """Describe a CUDA device.

    Args:
        index: Its number.

    Returns:
        The device, and the bytes of its L2 cache.

    Runtime: host only.
    """
    facts = torch.cuda.get_device_properties(index)
    device = Device(
        name=facts.name,
        capability=(facts.major, facts.minor),
        num_sms=facts.multi_processor_count,
    )
    return device, facts.L2_cache_size


def num_copies(layer: LayerShape, num_tokens: int, l2_bytes: int) -> int:
    """Return how many copies of a layer make a sweep that leaves no weights in the L2 cache for the next.

    Args:
        layer: The layer.
        num_tokens: T; few tokens touch few experts.
        l2_bytes: Of the L2 cache.

    Returns:
        Copies, 2 or more: so many that the weights touched are more than four times the cache.

    Raises:
        ConfigError: The layer is so small that it takes more than 256.
    """
    expert_bytes = (3 if layer.is_gated else 2) * layer.hidden_size * layer.intermediate_size * 2
    share = 1.0 - (1.0 - layer.top_k / layer.num_experts) ** num_tokens
    touched = layer.num_local_experts * share * expert_bytes
    copies = max(2, int(_L2_SIZES * l2_bytes / touched) + 1)
    if copies > _MOST_COPIES:
        raise ConfigError(
            f"with num_tokens={num_tokens} one layer touches {touched / 1e6:.3f} MB of weights, and {copies} copies are "
            f"needed to time them cold; accepted are {_MOST_COPIES}: time more tokens, or a larger layer"
        )
    return copies


def run_step(layer: LayerShape, step: Step, config: ExpertsConfig | None) -> None:
    """Run a whole layer, router logits to output, without any replay buffer.

    Args:
        layer: The layer.
        step: What it computes.
        config: Kernels and tiles; None for the reference, with float32 GEMMs.

    Runtime: that of `bf16_moe`.
    """
    weights = (step.weights.gemm1_weights, step.weights.gemm2_weights)
    if config is None:
        weights = (weights[0].float(), weights[1].float())
    bf16_moe(
        step.routing_logits,
        None,
        step.hidden_states,
        *weights,
        layer.num_experts,
        layer.top_k,
        None,
        None,
        layer.intermediate_size,
        0,
        layer.num_local_experts,
        routing_method_type=RoutingMethodType.Renormalize,
        activation_type=ActivationType.Swiglu if layer.is_gated else ActivationType.Relu2,
        output=step.output,
        backend=Backend.REFERENCE if config is None else Backend.TRITON,
        config=None if config is None else config.as_choice(),
    )


def _why(err: Exception) -> str:
    """First line of an error, with its type."""
    text = str(err).strip().split("\n", 1)[0]
    return f"{type(err).__name__}: {text}"


def _errors_of_a_configuration() -> tuple[type[Exception], ...]:
    """What is raised where a configuration cannot be compiled or launched; Triton's passes fail with RuntimeError."""
    from triton.errors import TritonError

    return (ConfigError, RuntimeError, TritonError)


class CheckedRuns:
    """Steps whose right results are known.

    Args:
        layer: The layer.
        steps: A step for each copy.
        run: What runs a step.

    Runtime: the constructor runs the reference once for each step: syncs, and holds `[T, H]` for each.
    """

    def __init__(self, layer: LayerShape, steps: Sequence[Step], run: RunStep = run_step) -> None:
        self._layer, self._steps, self._run = layer, steps, run
        self._expected: list[Tensor] = []
        for step in steps:
            run(layer, step, None)
            self._expected.append(step.output.clone())

    @property
    def num_steps(self) -> int:
        """Steps of a sweep."""
        return len(self._steps)

    def poison(self) -> None:
        """Make every output NaN, so that nothing passes that was not computed.

        Runtime: one launch for each step; no sync.
        """
        for step in self._steps:
            step.output.fill_(torch.nan)

    def sweep(self, config: ExpertsConfig) -> None:
        """Run every step once.

        Args:
            config: Kernels and tiles.

        Runtime: that of `bf16_moe` for each step.
        """
        for step in self._steps:
            self._run(self._layer, step, config)

    def fault(self) -> str | None:
        """Compare the outputs with what is right.

        Returns:
            What is wrong, None where nothing is.

        Runtime: syncs.
        """
        for index, (step, expected) in enumerate(zip(self._steps, self._expected, strict=True)):
            difference = step.output.double() - expected.double()
            error = (difference.norm() / expected.double().norm()).item()
            if not error < _MOST_ERROR:  # NaN is wrong too
                return f"copy {index} has a relative error of {error:.2e}; accepted is below {_MOST_ERROR:.0e}"
        return None


class GraphWorkload:
    """A `Workload` on a CUDA device: one graph over all copies for each configuration.

    Args:
        runs: The steps.

    Runtime: graphs share one memory pool; their results lie in the steps' outputs, outside of it.
    """

    def __init__(self, runs: CheckedRuns) -> None:
        self._runs = runs
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[ExpertsConfig, torch.cuda.CUDAGraph] = {}

    def refusal(self, config: ExpertsConfig) -> str | None:
        """Compile, capture, and compare the outputs of the graph with the reference.

        Args:
            config: What to try.

        Returns:
            Why it must not be used, or None.

        Runtime: syncs; compiles; captures one graph, which is kept until `release`.
        """
        if config in self._graphs:
            return None
        try:
            self._runs.sweep(config)
        except _errors_of_a_configuration() as err:
            if isinstance(err, torch.AcceleratorError | torch.OutOfMemoryError):
                raise  # the device has failed or is full: no other configuration can be judged either
            return _why(err)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._runs.sweep(config)
        self._runs.poison()
        graph.replay()
        fault = self._runs.fault()
        if fault is None:
            self._graphs[config] = graph
        return fault

    def sample_us(self, config: ExpertsConfig, num_samples: int) -> list[float]:
        """Time replays of the graph, one after the other on a busy device.

        Args:
            config: One that was not refused.
            num_samples: How many.

        Returns:
            Microseconds of a layer, for each replay.

        Runtime: syncs once.
        """
        graph = self._graphs[config]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(num_samples + 1)]
        graph.replay()  # the first launch of a graph is not hidden behind work before it
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        events[-1].synchronize()
        return [
            before.elapsed_time(after) * 1e3 / self._runs.num_steps
            for before, after in pairwise(events)
        ]

    def release(self, config: ExpertsConfig) -> None:
        """Free a configuration's graph.

        Args:
            config: One that may be held.

        Runtime: host only.
        """
        self._graphs.pop(config, None)


class LayerCopies:
    """Copies of a layer with random weights, and steps on them.

    Args:
        layer: The layer.
        fewest_tokens: Fewest tokens of a step: these touch the fewest weights, and so need the most copies.
        device: Where the weights lie.
        l2_bytes: Of its L2 cache.
        seed: Of weights, tokens and routing.

    Raises:
        ConfigError: The layer is too small to be timed with cold weights.

    Runtime: allocates `num_copies` layers in bfloat16.
    """

    def __init__(
        self,
        layer: LayerShape,
        *,
        fewest_tokens: int,
        device: torch.device,
        l2_bytes: int,
        seed: int,
    ) -> None:
        self._layer, self._device, self._l2_bytes, self._seed = layer, device, l2_bytes, seed
        rows = layer.intermediate_size * (2 if layer.is_gated else 1)
        sizes = (layer.num_local_experts, rows, layer.hidden_size)
        transposed = (layer.num_local_experts, layer.hidden_size, layer.intermediate_size)
        random = torch.Generator(device).manual_seed(seed)
        self._copies = [
            LayerWeights(
                gemm1_weights=self._normal(sizes, random).mul_(_WEIGHT_SCALE),
                gemm2_weights=self._normal(transposed, random).mul_(_WEIGHT_SCALE),
            )
            for _ in range(num_copies(layer, fewest_tokens, l2_bytes))
        ]

    def _normal(self, sizes: tuple[int, ...], random: torch.Generator, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:  # fmt: skip
        return torch.randn(sizes, generator=random, dtype=dtype, device=self._device)

    def steps(self, num_tokens: int) -> list[Step]:
        """Make a step for as many copies as so many tokens need.

        Args:
            num_tokens: T.

        Returns:
            Steps with tokens and routing of their own; the same ones for the same seed.

        Runtime: allocates O(T*(E+H)) for each.
        """
        random = torch.Generator(self._device).manual_seed(self._seed + num_tokens)
        needed = num_copies(self._layer, num_tokens, self._l2_bytes)
        rows = (num_tokens, self._layer.hidden_size)
        return [
            Step(
                weights=weights,
                routing_logits=self._normal(
                    (num_tokens, self._layer.num_experts), random, dtype=torch.float32
                ),
                hidden_states=self._normal(rows, random),
                output=torch.empty(rows, dtype=torch.bfloat16, device=self._device),
            )
            for weights in self._copies[:needed]
        ]
