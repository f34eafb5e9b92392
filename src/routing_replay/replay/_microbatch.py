"""The experts of one microbatch: targets first, then exactly what each router took."""

from collections.abc import Callable

import torch
from torch import Tensor

from routing_replay.errors import ReplayError
from routing_replay.replay._plan import ReplayPlan
from routing_replay.replay._recording import Recorder
from routing_replay.replay._stats import LayerCounter, count_mismatched
from routing_replay.trace import ModelRouting


class MicrobatchRecord:
    """The store behind one `replay` or `record` block, keyed by decoder layer.

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
        "recorder",
    )

    def __init__(self, plan: ReplayPlan, routing: ModelRouting, *, microbatch_id: int) -> None:
        self.plan = plan
        self.mb_id = microbatch_id
        self.fired: set[int] = set()
        self.is_released = False
        self.recorder: Recorder | None = None
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
        self,
        layer_idx: int,
        selection: Tensor,
        native_ids: Callable[[], Tensor],
        counter: LayerCounter,
    ) -> Tensor:
        """Return the experts that a router is to take in a forward pass.

        Args:
            layer_idx: Decoder layer.
            selection: What the router ranks experts by, `[tokens, E]`.
            native_ids: Makes the model's own top-k, int64 `[tokens, K]`.
            counter: Counts of this router.

        Returns:
            Expert ids, int64 `[tokens, K]`, on the device of `selection`.

        Raises:
            ReplayError: Another number of rows than the layout has, or a second call while it is
                recorded.

        Runtime: no host sync but for one copy of the targets per device; allocates 8 * tokens * K
            bytes, and 2 * tokens * K that stay until release; deterministic; no gradients.
        """
        self._check_rows(layer_idx, selection)
        with torch.no_grad():
            native = native_ids()
            frozen = self._effective.get(layer_idx)
            effective = self._forced(layer_idx, native) if frozen is None else frozen.long()
            if frozen is None:
                frozen = self._effective[layer_idx] = effective.to(self._id_dtype)
            if self.recorder is not None:
                self.recorder.note(layer_idx, frozen, selection)
            counter.count_call(self.plan, self._mismatched(native, effective))
        self.fired.add(layer_idx)
        return effective

    def repeated_ids(self, layer_idx: int, selection: Tensor, counter: LayerCounter) -> Tensor:
        """Return the experts that a router took, for a recomputation in a backward pass.

        Args:
            layer_idx: Decoder layer.
            selection: What the router ranks experts by, `[tokens, E]`.
            counter: Counts of this router.

        Returns:
            Expert ids, int64 `[tokens, K]`, on the device of `selection`.

        Raises:
            ReplayError: Another number of rows than the layout has, or the router took none yet.

        Runtime: no host sync; allocates 8 * tokens * K bytes; deterministic; no gradients.
        """
        self._check_rows(layer_idx, selection)
        frozen = self._effective.get(layer_idx)
        if frozen is None:
            raise ReplayError(
                f"decoder layer {layer_idx} is recomputed for microbatch {self.mb_id}, in whose"
                f" forward pass its router was not called; use the same model in both passes"
            )
        counter.count_recomputation()
        return frozen.long()

    def _check_rows(self, layer_idx: int, selection: Tensor) -> None:
        """Check that a router sees the rows that the layout describes."""
        if len(selection) != self.plan.num_tokens:
            raise ReplayError(
                f"the router of decoder layer {layer_idx} was called with {len(selection)} rows but"
                f" the layout of microbatch {self.mb_id} has {self.plan.num_tokens}; describe the"
                f" batch that the model is called with, padding included"
            )

    def _forced(self, layer_idx: int, native: Tensor) -> Tensor:
        """Return native ids with the replayed rows put in."""
        if self.plan.rows_replayed == 0:
            return native
        slot = self._routing.layer_ids.index(layer_idx)
        targets, mask = self._on_device(native.device)
        return torch.where(mask[:, None], targets[:, slot].long(), native)

    def _mismatched(self, native: Tensor, effective: Tensor) -> Tensor | None:
        """Count the replayed rows that would have taken other experts; `None` if none is."""
        if self.plan.rows_replayed == 0:
            return None
        return count_mismatched(native, effective, self._on_device(native.device)[1])

    def _on_device(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return targets and mask on a device, copied there once."""
        placed = self._by_device.get(device)
        if placed is None:
            targets = self.plan.targets.to(self._id_dtype).to(device)
            placed = self._by_device[device] = (targets, self.plan.mask.to(device))
        return placed
