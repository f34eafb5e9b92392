"""Forcing the experts of one router call, in whatever formula the router computes weights."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from routing_replay.errors import ReplayError
from routing_replay.replay._discovery import FoundRouter
from routing_replay.replay._state import ReplayState
from routing_replay.replay._stats import LayerCounter
from routing_replay.trace import ModelRouting

_TOPK_FUNCTIONS = (torch.topk, torch.Tensor.topk)
_TOPK_PARAMETERS = ("input", "k", "dim", "largest", "sorted")


class ForcedTopK(TorchFunctionMode):
    """Answers the top-k call that picks a router's experts with given ones.

    A call picks experts if its input is `[tokens, E]`, `k` is K, and it takes the largest along the
    last dimension. The values are gathered from the call's own input, so what the model computes
    from them, and its gradients, stay the model's own. Other calls pass through.

    Args:
        routing: The model's experts and top-k.
        choose: From the call's input, and a function that makes the model's own call and returns
            its expert ids, to the expert ids to answer with; ids are int64 `[tokens, K]`.
    """

    def __init__(
        self, routing: ModelRouting, choose: Callable[[Tensor, Callable[[], Tensor]], Tensor]
    ) -> None:
        super().__init__()
        self.num_matches = 0
        self._routing = routing
        self._choose = choose

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Answer a call that picks experts; pass on any other."""
        named = dict(kwargs or {})
        selection = self._selection(args, named) if func in _TOPK_FUNCTIONS else None
        if selection is None:
            return func(*args, **named)
        self.num_matches += 1

        def native_ids() -> Tensor:
            # The model's own call, with its own `sorted`: another order of the columns would change
            # the order in which its experts are summed.
            with torch.no_grad():
                return cast("tuple[Tensor, Tensor]", func(*args, **named))[1]

        topk_ids = self._choose(selection, native_ids)
        return torch.return_types.topk((selection.gather(-1, topk_ids), topk_ids))

    def _selection(self, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor | None:
        """Return the input of a call that picks experts, else `None`."""
        call = dict(zip(_TOPK_PARAMETERS, args, strict=False)) | kwargs
        source = call.get("input", call.get("self"))
        if not isinstance(source, Tensor) or source.dim() != 2 or "out" in call:
            return None
        picks = (
            source.size(-1) == self._routing.num_experts
            and call.get("k") == self._routing.top_k
            and call.get("dim", -1) in (-1, 1)
            and call.get("largest", True) is True
        )
        return source if picks else None


class RouterForward:
    """Stands in as `forward` of one router instance.

    Args:
        found: The router.
        routing: The model's experts and top-k.
        state: Which microbatch a call belongs to.
        counter: Counts of this router.
    """

    def __init__(
        self, found: FoundRouter, routing: ModelRouting, state: ReplayState, counter: LayerCounter
    ) -> None:
        self._found = found
        self._routing = routing
        self._state = state
        self._counter = counter
        self._was_on_instance = "forward" in vars(found.router)
        self._original: Callable[..., object] = found.router.forward

    def install(self) -> None:
        """Put this object in place of the router's forward."""
        self._found.router.forward = self

    def is_installed(self) -> bool:
        """Whether the router still calls this object."""
        return vars(self._found.router).get("forward") is self

    def uninstall(self) -> None:
        """Restore what `install` found, the absence of an instance attribute included.

        Does nothing where the router does not call this object.
        """
        if not self.is_installed():
            return
        if self._was_on_instance:
            self._found.router.forward = self._original
        else:
            del self._found.router.forward

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run the router's own forward, with forced experts where a microbatch is replayed."""
        layer_idx = self._found.layer_idx
        record, is_recomputation = self._state.resolve(layer_idx)
        if record is None:
            return self._original(*args, **kwargs)

        def choose(selection: Tensor, native_ids: Callable[[], Tensor]) -> Tensor:
            if is_recomputation:
                return record.repeated_ids(layer_idx, selection, self._counter)
            return record.effective_ids(layer_idx, selection, native_ids, self._counter)

        with ForcedTopK(self._routing, choose) as mode:
            output = self._original(*args, **kwargs)
        if mode.num_matches != 1:
            raise ReplayError(
                f"the router of decoder layer {layer_idx} ({self._found.path}) picked experts in"
                f" {mode.num_matches} top-k calls over [tokens, {self._routing.num_experts}] with"
                f" k = {self._routing.top_k}; replay needs exactly one (a fused or replaced router"
                f" has none): use the model's own implementation"
            )
        return output

    def __deepcopy__(self, memo: dict[int, object]) -> object:
        # A copied model (a reference model, say) has routers of its own and must not follow ours.
        return copy.deepcopy(self._original, memo)


class LayerTag:
    """Forward hook of one decoder layer: tags its output for the backward pass.

    Args:
        layer_idx: Decoder layer.
        state: Which microbatch a call belongs to.
    """

    def __init__(self, layer_idx: int, state: ReplayState) -> None:
        self._layer_idx = layer_idx
        self._state = state

    def __call__(
        self, layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object
    ) -> None:
        """Tag one call of the layer."""
        hidden_in = args[0] if args else kwargs.get("hidden_states")
        self._state.tag_layer(self._layer_idx, layer, hidden_in, output)

    def __deepcopy__(self, memo: dict[int, object]) -> object:
        return _no_tag


def _no_tag(*_call: object) -> None:
    """Do nothing, in the place of a `LayerTag` whose model was copied."""
