"""The experts of one microbatch: targets first, then exactly what each router took."""

import torch
from torch import Tensor

from routing_replay.errors import ReplayError
from routing_replay.replay._plan import ModelRouting, ReplayPlan
from routing_replay.replay._stats import LayerCounter, count_mismatched


class MicrobatchRecord:
    """The store behind one `replay` block, keyed by decoder layer.

    A router's first forward pass freezes its *effective* ids, replayed and native rows alike. Every
    later pass of the same microbatch, recomputed or not, takes them again, so that activation
    checkpointing cannot flip a near tie in a native row.

    Args:
        plan: Targets of every router row.
        routing: The model's layers, experts and top-k.
        microbatch_id: The caller's name for the microbatch.
    """

    __slots__ = (
        "_by_device",
        "_effective",
        "_id_dtype",
        "_routing",
        "fired",
        "is_released",
        "mb_id",
        "plan",
    )

    def __init__(self, plan: ReplayPlan, routing: ModelRouting, *, microbatch_id: int) -> None:
        self.plan = plan
        self.mb_id = microbatch_id
        self.fired: set[int] = set()
        self.is_released = False
        self._routing = routing
        # Kept until the backward pass: int64 would be four times the bytes.
        self._id_dtype = torch.int16 if routing.num_experts <= 1 << 15 else torch.int32
        self._by_device: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._effective: dict[int, Tensor] = {}

    def is_frozen(self, layer_idx: int) -> bool:
        """Whether the router of a layer has taken its experts."""
        return layer_idx in self._effective

    def release(self) -> None:
        """Drop all ids; a later recomputation is an error."""
        self.is_released = True
        self._by_device.clear()
        self._effective.clear()

    def effective_ids(
        self, layer_idx: int, selection: Tensor, counter: LayerCounter, *, is_recomputation: bool
    ) -> Tensor:
        """Return the experts that a router is to take.

        Args:
            layer_idx: Decoder layer.
            selection: What the router ranks experts by, `[tokens, E]`.
            counter: Counts of this router.
            is_recomputation: The call repeats an earlier one in a backward pass.

        Returns:
            Expert ids, int64 `[tokens, K]`, on the device of `selection`.

        Raises:
            ReplayError: Another number of rows than the layout has.

        Runtime: no host sync but for one copy of the targets per device; allocates 8 * tokens * K
            bytes, and 2 * tokens * K that stay until release; deterministic; no gradients.
        """
        if len(selection) != self.plan.num_tokens:
            raise ReplayError(
                f"the router of decoder layer {layer_idx} was called with {len(selection)} rows but"
                f" the layout of microbatch {self.mb_id} has {self.plan.num_tokens}; describe the"
                f" batch that the model is called with, padding included"
            )
        with torch.no_grad():
            frozen = self._effective.get(layer_idx)
            native = selection.detach().topk(self._routing.top_k, dim=-1).indices
            targets, mask = self._on_device(selection.device)
            if frozen is None:
                slot = self._routing.layer_ids.index(layer_idx)
                effective = torch.where(mask[:, None], targets[:, slot].long(), native)
                self._effective[layer_idx] = effective.to(self._id_dtype)
            else:
                effective = frozen.long()
            if is_recomputation:
                counter.count_recomputation()
            else:
                counter.count_call(self.plan, count_mismatched(native, effective, mask))
                self.fired.add(layer_idx)
        return effective

    def _on_device(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return targets and mask on a device, copied there once."""
        placed = self._by_device.get(device)
        if placed is None:
            targets = self.plan.targets.to(self._id_dtype).to(device)
            placed = self._by_device[device] = (targets, self.plan.mask.to(device))
        return placed
