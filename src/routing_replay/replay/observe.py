"""What the experts of a model really receive, seen without any part of replay."""

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from routing_replay.errors import ReplayError, UnsupportedModelError
from routing_replay.replay._discovery import layer_in_path

_ARGUMENT = "top_k_index"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ObservedExpertIds:
    """The `top_k_index` of every experts call, in call order.

    A forward pass that activation checkpointing recomputes is a call of its own.

    Attributes:
        ids_by_layer: Decoder layer to one int64 `[tokens, K]` copy per call.
    """

    ids_by_layer: dict[int, list[Tensor]] = field(default_factory=dict[int, list[Tensor]])

    def stacked(self) -> Tensor:
        """Join the calls of each layer along the tokens, and the layers beside each other.

        Returns:
            Expert ids, int64 `[tokens, L, K]`, layers increasing, on the device of the first layer.

        Raises:
            ReplayError: Nothing was observed, or not the same number of tokens in every layer.

        Runtime: no host sync on one device; allocates 8 * tokens * L * K bytes; deterministic; no
            gradients.
        """
        joined = [
            torch.cat(self.ids_by_layer[idx])
            for idx in sorted(self.ids_by_layer)
            if self.ids_by_layer[idx]
        ]
        tokens = {idx: sum(map(len, calls)) for idx, calls in sorted(self.ids_by_layer.items())}
        if not joined or len(set(tokens.values())) != 1:
            raise ReplayError(
                f"tokens seen by the experts of each decoder layer: {tokens}; stacking needs the"
                f" same number, above 0, in every layer"
            )
        return torch.stack([ids.to(joined[0].device) for ids in joined], dim=1)


@contextmanager
def observe_expert_ids(model: nn.Module) -> Generator[ObservedExpertIds]:
    """Copy the expert ids that every experts module is called with inside the block.

    Works with any implementation behind the module (`eager`, `batched_mm`, `grouped_mm`), because
    it looks at the call and not at the computation; attached or not makes no difference.

    Args:
        model: A Transformers model whose experts take an argument `top_k_index`.

    Yields:
        The container that fills up.

    Raises:
        UnsupportedModelError: No such experts module, or two in one decoder layer.

    Runtime: one copy of `[tokens, K]` per call, no host sync; not CUDA-graph safe; does not touch
        results or gradients.
    """
    observed = ObservedExpertIds()
    handles = [
        experts.register_forward_pre_hook(
            partial(_record_call, observed.ids_by_layer.setdefault(layer_idx, []), position),
            with_kwargs=True,
        )
        for layer_idx, (experts, position) in _find_experts(model).items()
    ]
    try:
        yield observed
    finally:
        for handle in handles:
            handle.remove()


def _find_experts(model: nn.Module) -> dict[int, tuple[nn.Module, int]]:
    """Map decoder layers to their experts module and the position of its ids argument."""
    found: dict[int, tuple[nn.Module, int]] = {}
    for path, module in model.named_modules():
        place = layer_in_path(path)
        position = _argument_position(type(module).forward)
        if place is None or position is None:
            continue
        layer_idx = place[0]
        if layer_idx in found:
            raise UnsupportedModelError(
                f"decoder layer {layer_idx} has two modules that take {_ARGUMENT}, the second at"
                f" {path!r}; observation needs one per layer"
            )
        found[layer_idx] = (module, position)
    if not found:
        raise UnsupportedModelError(
            f"no module inside a '.layers.<number>.' of {type(model).__name__} takes {_ARGUMENT}; its"
            f" experts cannot be observed"
        )
    return found


def _argument_position(forward: Callable[..., object]) -> int | None:
    """Return the position of the ids among the arguments after `self`, if there is one."""
    try:
        names = list(inspect.signature(forward).parameters)
    except (TypeError, ValueError):
        return None
    return names.index(_ARGUMENT) - 1 if _ARGUMENT in names else None


def _record_call(
    calls: list[Tensor],
    position: int,
    module: nn.Module,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> None:
    """Copy the ids of one call."""
    topk_ids = kwargs.get(_ARGUMENT, args[position] if position < len(args) else None)
    if not isinstance(topk_ids, Tensor):
        raise ReplayError(
            f"{type(module).__name__} was called with {_ARGUMENT} = {topk_ids!r}; a tensor is needed"
        )
    # A copy, because an implementation may sort or remap its argument in place.
    calls.append(topk_ids.detach().clone().to(torch.int64))
