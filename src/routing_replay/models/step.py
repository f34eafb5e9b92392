"""What a forward pass is given besides weights: the tokens of a step, and where they live."""

from dataclasses import dataclass

from torch import Tensor

from routing_replay.capture import DeviceCache, ReplayBuffer

__all__ = ["RoutingBuffers", "SequenceSpan", "StepInputs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSpan:
    """The tokens of one sequence in a step.

    Attributes:
        first_row: Row of its first token among the step's rows.
        num_tokens: How many tokens it has in the step.
        context_len: Tokens of the sequence once the step has run, these included.
    """

    first_row: int
    num_tokens: int
    context_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """The tokens of a step, flattened over its sequences.

    Attributes:
        token_ids: int64 `[T]`.
        positions: int64 `[T]`, token index of each row in its sequence.
        slot_mapping: int64 `[T]`, where each row's key and value go: `block_id * block_size + offset`.
        block_tables: int64 `[B, max_blocks]`, KV blocks of each sequence; entries past its length are 0.
        spans: One per sequence, sequences that decode (one token) first.
        num_decodes: How many spans decode.
        decode_mask: bool `[num_decodes, 1, 1, blocks of the longest of them * block_size]`, True where a decoding row may attend.
        query_starts: int32 `[B + 1]`, row of each sequence's first token, for the paged attention op; None on the CPU.
        context_lens: int32 `[B]`, tokens of each sequence once the step has run, 0 for a sequence that pads; None on the CPU.
        max_query_len: Most tokens of one sequence in the step.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    spans: tuple[SequenceSpan, ...]
    num_decodes: int
    decode_mask: Tensor | None
    query_starts: Tensor | None = None
    context_lens: Tensor | None = None
    max_query_len: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingBuffers:
    """Where the MoE layers record their experts, and where they find given ones; None switches either off."""

    device_cache: DeviceCache | None = None
    replay_buffer: ReplayBuffer | None = None
