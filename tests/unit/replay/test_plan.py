import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from routing_replay.errors import ConfigError, TraceFormatError, TraceMismatchError
from routing_replay.replay import Packed, Padded
from routing_replay.replay._plan import build_plan, native_plan
from routing_replay.trace import ModelRouting, RoutingTrace
from unit.replay.tiny_qwen3_moe import LAYER_IDS, NUM_LAYERS, make_trace, random_ids

ROUTING = ModelRouting(layer_ids=LAYER_IDS, num_layers=NUM_LAYERS, num_experts=8, top_k=2)
TOKENS = [10, 11, 12, 13]


def trace_of(rows: int = 3, tokens: list[int] = TOKENS, **fields: object):
    return make_trace(tokens, random_ids(rows, 8, 2, seed=rows), num_experts=8, **fields)


def plan_of(
    traces: list[RoutingTrace | None],
    layout: Packed | Padded,
    *,
    routing: ModelRouting = ROUTING,
    token_ids: list[object] | None = None,
    on_missing: object = "error",
):
    return build_plan(routing, traces, layout, token_ids=token_ids, on_missing=on_missing)


def test_plan_places_rows_and_leaves_padding_native():
    first, second = trace_of(3), trace_of(1, TOKENS[:2])
    plan = plan_of([first, second], Padded(lengths=(4, 2), seq_len=5, side="left"))
    want = np.full((10, 2, 2), -1)
    want[1:4], want[8:9] = first.ids, second.ids
    np.testing.assert_array_equal(plan.targets.numpy(), want)
    assert plan.targets.dtype == torch.int64
    assert plan.mask.nonzero().flatten().tolist() == [1, 2, 3, 8]
    assert (plan.rows_replayed, plan.rows_native_last, plan.rows_native_missing) == (4, 2, 0)
    assert plan.num_tokens == 10


def test_plan_uses_the_last_row_where_the_trace_has_it():
    plan = plan_of([trace_of(4), trace_of(3)], Packed(lengths=(4, 4)))
    assert plan.mask.tolist() == [True] * 7 + [False]
    assert (plan.rows_replayed, plan.rows_native_last) == (7, 1)


def test_plan_of_one_token_needs_no_row():
    plan = plan_of([None, trace_of()], Packed(lengths=(1, 4)))
    assert (plan.rows_replayed, plan.rows_native_last, plan.rows_native_missing) == (3, 2, 0)


@pytest.mark.parametrize(
    ("trace", "reason", "absent"),
    [
        (trace_of(2, start=1), r"token index 0 \(1 of 3 .*\[1, 3\)", 1),
        (trace_of(2), r"token index 2 \(1 of 3 .*\[0, 2\)", 1),
        (trace_of(valid=[True, False, True]), r"token index 1 \(1 of 3 .*marked invalid", 1),
        (None, r"token index 0 \(3 of 3 .*no trace", 3),
    ],
    ids=["late-start", "too-short", "invalid-row", "no-trace"],
)
def test_plan_refuses_or_counts_missing_rows(trace: RoutingTrace | None, reason: str, absent: int):
    layout = Packed(lengths=(4, 4))
    with pytest.raises(TraceMismatchError, match=rf"sequence 1 .*{reason}.*on_missing='native'"):
        plan_of([trace_of(), trace], layout)
    plan = plan_of([trace_of(), trace], layout, on_missing="native")
    assert plan.rows_native_missing == absent
    assert plan.rows_replayed == 6 - absent
    assert int(plan.mask.sum()) == 6 - absent
    assert (plan.targets[~plan.mask] == -1).all()


def test_plan_counts_an_invalid_last_row_as_last():
    plan = plan_of([trace_of(4, valid=[True, True, True, False])], Packed(lengths=(4,)))
    assert (plan.rows_native_last, plan.rows_native_missing) == (1, 0)


def test_plan_refuses_too_many_rows():
    with pytest.raises(TraceMismatchError, match=r"traces\[0\] .*\[0, 5\).* 4 tokens"):
        plan_of([trace_of(5, [*TOKENS, 14])], Packed(lengths=(4,)))
    with pytest.raises(TraceMismatchError, match=r"\[2, 5\).* 4 tokens"):
        plan_of([trace_of(3, [*TOKENS, 14], start=2)], Packed(lengths=(4,)), on_missing="native")


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("num_experts", 16, r"num_experts = 8 .* num_experts = 16"),
        ("top_k", 3, r"top_k = 2 .* top_k = 3"),
        ("num_layers", 4, r"num_layers = 3 .* num_layers = 4"),
        ("layer_ids", (0, 1), r"layer_ids = \(1, 2\) .* layer_ids = \(0, 1\)"),
    ],
)
def test_plan_refuses_traces_of_another_model(field: str, value: object, shown: str):
    routing = dataclasses.replace(ROUTING, **{field: value})
    with pytest.raises(TraceMismatchError, match=shown):
        plan_of([trace_of()], Packed(lengths=(4,)), routing=routing)


def test_plan_refuses_ids_out_of_range_and_repeated():
    ids = trace_of().ids.copy()
    ids[2, 1, 0] = 8
    with pytest.raises(TraceMismatchError, match=r"ids\[2, 1, 0\] = 8 .*layer 2.*\[0, 8\)"):
        plan_of([dataclasses.replace(trace_of(), ids=ids)], Packed(lengths=(4,)))
    ids[2, 1] = 5
    with pytest.raises(TraceFormatError, match=r"traces\[0\]: .*repeats"):
        plan_of([dataclasses.replace(trace_of(), ids=ids)], Packed(lengths=(4,)))


@pytest.mark.parametrize("as_tokens", [list, np.array, torch.tensor])
def test_plan_checks_token_digests(as_tokens: Callable[[list[int]], object]):
    layout = Packed(lengths=(4,))
    plan_of([trace_of()], layout, token_ids=[as_tokens(TOKENS)])
    with pytest.raises(TraceMismatchError, match=r"traces\[0\]: "):
        plan_of([trace_of()], layout, token_ids=[as_tokens([10, 11, 99, 13])])


def test_plan_does_not_look_at_a_last_token_without_a_row():
    plan_of([trace_of()], Packed(lengths=(4,)), token_ids=[[10, 11, 12, 99]])


def test_plan_refuses_other_counts():
    layout = Packed(lengths=(4, 4))
    with pytest.raises(ConfigError, match=r"traces has 1 entries .* 2 sequences"):
        plan_of([trace_of()], layout)
    with pytest.raises(ConfigError, match=r"token_ids has 1 entries .* 2 sequences"):
        plan_of([trace_of(), trace_of()], layout, token_ids=[TOKENS])
    with pytest.raises(ConfigError, match=r"token_ids\[1\] has 3 tokens .*lengths\[1\] = 4"):
        plan_of([trace_of(), trace_of()], layout, token_ids=[TOKENS, TOKENS[:3]])


@pytest.mark.parametrize("on_missing", ["zero", "mask", None])
def test_plan_refuses_unknown_policies(on_missing: object):
    with pytest.raises(ConfigError, match=r"'error', 'native', 'mask_loss', 'drop'"):
        plan_of([trace_of()], Packed(lengths=(4,)), on_missing=on_missing)


# Three sequences of tokens 0 to 3: complete, token 1 missing, and nothing captured.
MISSING = [trace_of(), trace_of(valid=[True, False, True]), None]
LENGTHS = (4, 4, 3)
LOSS_MASKS = {
    "native": ["TTT-", "TTT-", "TT-"],
    "mask_loss": ["TTT-", "T-T-", "---"],
    "drop": ["TTT-", "----", "---"],
}


@pytest.mark.parametrize("policy", LOSS_MASKS)
def test_loss_mask_follows_the_policy_in_every_layout(policy: str):
    want = LOSS_MASKS[policy]

    def rows_of(layout: Packed | Padded):
        plan = plan_of(MISSING, layout, on_missing=policy)
        assert plan.loss_mask.dtype == torch.bool
        assert plan.rows_native_missing == 3
        return ["".join("T" if kept else "-" for kept in row) for row in plan.loss_mask.tolist()]

    assert rows_of(Packed(lengths=LENGTHS)) == ["".join(want)]
    assert rows_of(Padded(lengths=LENGTHS, seq_len=6)) == [row.ljust(6, "-") for row in want]
    left = Padded(lengths=LENGTHS, seq_len=6, side="left")
    assert rows_of(left) == [row.rjust(6, "-") for row in want]


@pytest.mark.parametrize("policy", ["error", *LOSS_MASKS])
def test_loss_mask_of_complete_traces_keeps_all_but_last_tokens(policy: str):
    plan = plan_of([trace_of(), trace_of(4)], Packed(lengths=(4, 4)), on_missing=policy)
    assert plan.loss_mask.tolist() == [[True, True, True, False] * 2]


@pytest.mark.parametrize("policy", ["mask_loss", "drop"])
def test_loss_mask_does_not_miss_the_last_row(policy: str):
    plan = plan_of(
        [trace_of(4, valid=[True, True, True, False]), None],
        Packed(lengths=(4, 1)),
        on_missing=policy,
    )
    assert plan.loss_mask.tolist() == [[True, True, True, False, False]]


def test_native_plan_forces_nothing_and_counts_nothing():
    plan = native_plan(ROUTING, Padded(lengths=(2, 4), seq_len=5))
    assert plan.targets.shape == (10, 2, 2)
    assert (plan.targets == -1).all()
    assert not plan.mask.any()
    assert (plan.rows_replayed, plan.rows_native_last, plan.rows_native_missing) == (0, 0, 0)
