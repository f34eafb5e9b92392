"""Weights, tokens and routing of the measured layers, and what their output must be."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_bench.floors import Work, work_of
from moe_bench.shapes import LayerShape
from routing_replay.kernels.routing import route_reference

__all__ = ["LayerInput", "LayerWeights", "expected_output", "layer_inputs", "layer_weights", "relative_l2", "work_of_inputs"]  # fmt: skip

_WEIGHT_SCALE = 0.02
_BIAS_SCALE = 0.1


@dataclass(slots=True, kw_only=True)
class LayerWeights:
    """The experts of one layer, and the other layout that some peers want of them.

    Attributes:
        gemm1: `[E_local, 2I, H]`, rows `[gate; up]`.
        gemm2: `[E_local, H, I]`.
    """

    gemm1: Tensor
    gemm2: Tensor
    _interleaved: Tensor | None = field(default=None, init=False)

    def interleaved_gemm1(self) -> Tensor:
        """Return `gemm1` with rows gate 0, up 0, gate 1, up 1, ...; made once and shared between peers."""
        if self._interleaved is None:
            experts, rows, hidden = self.gemm1.shape
            halves = self.gemm1.view(experts, 2, rows // 2, hidden)
            self._interleaved = halves.transpose(1, 2).reshape(experts, rows, hidden).contiguous()
        return self._interleaved


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInput:
    """What one layer gets, and how it must route.

    Attributes:
        x: Hidden states `[T, H]` bfloat16, the same in all layers.
        logits: Router logits float32 `[T, E]`.
        bias: Selection bias float32 `[E]` where the router has one.
        topk_ids: The reference's ids int64 `[T, K]`.
        topk_weights: The reference's weights float32 `[T, K]`.
    """

    x: Tensor
    logits: Tensor
    bias: Tensor | None
    topk_ids: Tensor
    topk_weights: Tensor


def layer_weights(shape: LayerShape, seed: int, device: str) -> LayerWeights:
    """Return normal random weights, bfloat16.

    Args:
        shape: The layer.
        seed: Of these weights.
        device: Where they are made.

    Returns:
        Weights of one layer, standard deviation 0.02.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        values = torch.empty(size, dtype=torch.bfloat16, device=device)
        return values.normal_(0.0, _WEIGHT_SCALE, generator=generator)

    experts, hidden, inner = shape.num_local_experts, shape.hidden_size, shape.intermediate_size
    return LayerWeights(gemm1=normal(experts, 2 * inner, hidden), gemm2=normal(experts, hidden, inner))  # fmt: skip


def layer_inputs(
    shape: LayerShape, num_tokens: int, layers: int, *, seed: int, zipf: float, device: str
) -> list[LayerInput]:
    """Return the inputs of some layers: normal rows, and logits that differ from layer to layer.

    Args:
        shape: The layer.
        num_tokens: T.
        layers: How many.
        seed: Of these inputs.
        zipf: Exponent s of a skewed load: `s * log(rank)` is taken off the logits, with experts ranked at random in each
            layer; 0 for an even load.
        device: Where they are made.

    Returns:
        One input per layer.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    experts = shape.routing.num_experts
    x = torch.randn(num_tokens, shape.hidden_size, device=device, generator=generator).bfloat16()
    inputs: list[LayerInput] = []
    for _ in range(layers):
        logits = torch.randn(num_tokens, experts, device=device, generator=generator)
        if zipf:
            ranks = torch.randperm(experts, device=device, generator=generator) + 1.0
            logits -= zipf * ranks.log()
        bias = None
        if shape.routing.takes_bias:
            bias = _BIAS_SCALE * torch.randn(experts, device=device, generator=generator)
        weights, ids = route_reference(logits, shape.routing, routing_bias=bias)
        inputs.append(LayerInput(x=x, logits=logits, bias=bias, topk_ids=ids.long(), topk_weights=weights))  # fmt: skip
    return inputs


def expected_output(given: LayerInput, weights: LayerWeights) -> Tensor:
    """Compute a layer in float32, expert by expert.

    Args:
        given: The layer's input; experts that are not in `weights` add nothing.
        weights: bfloat16 weights.

    Returns:
        float32 `[T, H]`. On a GPU `torch.backends.cuda.matmul.allow_tf32` must be off.
    """
    x = given.x.float()
    output = torch.zeros_like(x)
    inner = weights.gemm2.shape[2]
    for expert in range(weights.gemm1.shape[0]):
        tokens, columns = (given.topk_ids == expert).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        projected = x[tokens] @ weights.gemm1[expert].float().T
        hidden = torch.nn.functional.silu(projected[:, :inner]) * projected[:, inner:]
        scaled = (hidden @ weights.gemm2[expert].float().T) * given.topk_weights[tokens, columns, None]  # fmt: skip
        output.index_add_(0, tokens, scaled)
    return output


def relative_l2(output: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected; NaN where anything is NaN.

    Args:
        output: Any float dtype.
        expected: float32, same shape.

    Returns:
        A relative error; the difference itself where all expected values are 0.
    """
    scale = expected.norm()
    error = (output.float() - expected).norm()
    return float(error / scale if scale > 0 else error)


def work_of_inputs(
    shape: LayerShape, inputs: list[LayerInput], *, weight_bytes: int = 2, activation_bytes: int = 2
) -> Work:
    """Count the work of the mean layer from the ids that its router really picks.

    Args:
        shape: The layer.
        inputs: All layers of a graph.
        weight_bytes: Bytes of one weight.
        activation_bytes: Bytes of one activation.

    Returns:
        Work of one layer.
    """
    touched, pairs, rows = 0, 0, 0
    for given in inputs:
        local = given.topk_ids < shape.num_local_experts
        touched += int(given.topk_ids[local].unique().numel())
        pairs += int(local.sum())
        rows += int(local.any(dim=1).sum())
    count = len(inputs)
    return work_of(
        shape,
        num_tokens=inputs[0].x.shape[0],
        touched_experts=touched / count,
        local_pairs=pairs / count,
        rows_read=rows / count,
        weight_bytes=weight_bytes,
        activation_bytes=activation_bytes,
    )
