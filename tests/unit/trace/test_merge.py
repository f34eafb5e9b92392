import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing_replay.errors import ConfigError, TraceMismatchError
from routing_replay.trace import RoutingTrace
from unit.trace.trace_cases import (
    invalid_rows,
    random_ids,
    random_trace,
    tokens_of,
    traces,
    versions_of,
)


@given(traces(), st.data())
def test_slice_then_merge_gives_the_original(trace: RoutingTrace, data: st.DataObject):
    cut = data.draw(st.integers(trace.start, trace.end))
    head, tail = trace.slice(trace.start, cut), trace.slice(cut, trace.end)
    assert head.merge(tail).equals(trace)
    if cut > trace.start:
        assert head.merge(trace.slice(cut - 1, trace.end)).equals(trace)


@given(traces(), st.data())
def test_slice_takes_exactly_the_rows_of_its_range(trace: RoutingTrace, data: st.DataObject):
    start = data.draw(st.integers(trace.start, trace.end))
    stop = data.draw(st.integers(start, trace.end))
    piece = trace.slice(start, stop)
    rows = slice(start - trace.start, stop - trace.start)
    piece.validate()
    assert (piece.start, piece.end, piece.num_rows) == (start, stop, stop - start)
    assert piece.ids.tolist() == trace.ids[rows].tolist()
    assert piece.valid.tolist() == trace.valid[rows].tolist()
    assert piece.token_digest.tolist() == trace.token_digest[rows].tolist()
    assert versions_of(piece) == versions_of(trace)[rows]
    assert piece.ordered == trace.ordered
    assert trace.slice(trace.start, stop).slice(start, stop).equals(piece)


@given(traces(min_rows=1), st.data())
def test_truncate_keeps_the_rows_of_the_first_tokens(trace: RoutingTrace, data: st.DataObject):
    num_tokens = data.draw(st.integers(trace.start + 1, trace.end + 3))
    short = trace.truncate(num_tokens)
    assert short.end == min(trace.end, num_tokens)
    assert short.equals(trace.slice(trace.start, short.end))
    assert short.truncate(num_tokens).equals(short)


@pytest.mark.parametrize("num_tokens", [-1, 0, 1, 4, 5])
def test_truncate_refuses_to_leave_nothing(num_tokens: int):
    with pytest.raises(ConfigError, match=rf"truncate\({num_tokens}\) .* num_tokens >= 6"):
        random_trace(start=5).truncate(num_tokens)


@pytest.mark.parametrize(("start", "stop"), [(4, 6), (5, 13), (8, 7), (-3, -1), (12, 13)])
def test_slice_refuses_a_range_outside_the_trace(start: int, stop: int):
    with pytest.raises(ConfigError, match=rf"slice \[{start}, {stop}\) .* \[5, 12\)"):
        random_trace(start=5).slice(start, stop)


def pieces(**changes: object) -> tuple[RoutingTrace, RoutingTrace]:
    """Return rows [0, 5) and rows [4, 9) of one sequence, of which row 4 was routed differently."""
    first = random_trace(1, rows=5, weights_version=1)
    ids = random_ids(2, rows=5, layers=3, num_experts=64, top_k=4)
    options = {"start": 4, "token_ids": tokens_of(1, 9), "weights_version": 2, **changes}
    delta = RoutingTrace.from_rows(
        ids, layer_ids=first.layer_ids, num_layers=6, num_experts=64, **options
    )
    assert first.ids[4].tolist() != delta.ids[0].tolist()
    return first, delta


def test_merge_lets_the_later_row_win():
    first, delta = pieces()
    merged = first.merge(delta)
    merged.validate(tokens_of(1, 10))
    assert merged.ids.tolist() == [*first.ids[:4].tolist(), *delta.ids.tolist()]
    assert merged.weights_version == ((0, 1), (4, 2))
    assert first.merge(delta, token_ids=tokens_of(1, 9)).equals(merged)


def test_merge_replaces_a_missing_row():
    first, delta = pieces()
    merged = invalid_rows(first, [4]).merge(delta)
    assert merged.is_complete
    assert merged.ids[4].tolist() == delta.ids[0].tolist()


def test_merge_keeps_a_captured_row_where_the_later_one_is_missing():
    first, delta = pieces()
    merged = first.merge(invalid_rows(delta, [0]))
    assert merged.is_complete
    assert merged.ids.tolist() == [*first.ids.tolist(), *delta.ids[1:].tolist()]
    assert merged.weights_version == ((0, 1), (5, 2))
    both_missing = invalid_rows(first, [4]).merge(invalid_rows(delta, [0]))
    assert both_missing.valid.tolist() == [True] * 4 + [False] + [True] * 4
    assert both_missing.weights_version == ((0, 1), (4, 2))


def test_merge_of_one_row_over_one_row_keeps_the_later():
    first, delta = pieces()
    merged = first.slice(4, 5).merge(delta.slice(4, 5))
    assert merged.equals(delta.slice(4, 5))


def test_merge_joins_runs_of_the_same_version():
    first, delta = pieces(weights_version=1)
    assert first.merge(delta).weights_version == ((0, 1),)
    assert first.merge(delta.slice(5, 9)).weights_version == ((0, 1),)


@pytest.mark.parametrize(("mine", "theirs"), [(True, False), (False, True), (False, False)])
def test_merge_is_ordered_only_where_both_are(mine: bool, theirs: bool):
    first, delta = (dataclasses.replace(piece, ordered=True) for piece in pieces())
    assert first.merge(delta).ordered
    first = dataclasses.replace(first, ordered=mine)
    assert not first.merge(dataclasses.replace(delta, ordered=theirs)).ordered


@pytest.mark.parametrize("start", [0, 3, 6, 100])
def test_merge_refuses_a_gap_or_a_longer_overlap(start: int):
    first, _ = pieces()
    delta = random_trace(1, rows=2, start=start)
    with pytest.raises(TraceMismatchError, match=rf"rows \[{start}, {start + 2}\) .* \[0, 5\)"):
        first.merge(delta)


def test_merge_takes_an_empty_piece_only_at_the_end():
    first, delta = pieces()
    assert first.merge(delta.slice(5, 5)).equals(first)
    assert delta.slice(4, 4).merge(delta).equals(delta)
    with pytest.raises(TraceMismatchError, match="one common row"):
        first.merge(delta.slice(4, 4))
    with pytest.raises(TraceMismatchError, match="one common row"):
        delta.slice(5, 5).merge(delta)


@pytest.mark.parametrize("at", [0, 3, 4])
def test_merge_refuses_a_common_row_of_other_tokens(at: int):
    tokens = tokens_of(1, 9)
    tokens[at] += 1
    first, delta = pieces(token_ids=tokens)
    with pytest.raises(TraceMismatchError, match="common row at token index 4 has token_digest"):
        first.merge(delta)


def test_merge_checks_an_append_against_the_tokens():
    tokens = tokens_of(1, 9)
    tokens[2] += 1
    first, delta = pieces(token_ids=tokens)
    delta = delta.slice(5, 9)
    assert first.merge(delta).num_rows == 9
    with pytest.raises(TraceMismatchError, match=r"the trace belongs to other tokens: .* index 2 "):
        first.merge(delta, token_ids=tokens)
    with pytest.raises(TraceMismatchError, match=r"delta belongs to other tokens: .* before .* 5 "):
        first.merge(delta, token_ids=tokens_of(1, 9))
    with pytest.raises(TraceMismatchError, match="8 tokens"):
        first.merge(delta, token_ids=tokens[:2] + tokens_of(1, 8)[2:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 128}, "num_experts = 128 but the trace has 64"),
        ({"num_layers": 7}, "num_layers = 7"),
        ({"layer_ids": (0, 1, 2)}, "layer_ids"),
    ],
)
def test_merge_refuses_another_layout(changes: dict[str, object], message: str):
    first, delta = pieces()
    with pytest.raises(TraceMismatchError, match=message):
        first.merge(dataclasses.replace(delta, **changes))


def test_merge_refuses_another_top_k():
    with pytest.raises(TraceMismatchError, match="top_k = 3 but the trace has 4"):
        random_trace(rows=2).merge(random_trace(rows=2, start=2, top_k=3))


def test_merge_keeps_weights_only_of_one_kind():
    first, delta = pieces()
    half, single = np.ones((5, 3, 4), np.float16), np.ones((5, 3, 4), np.float32)
    merged = dataclasses.replace(first, weights=half).merge(
        dataclasses.replace(delta, weights=half * 2)
    )
    assert merged.weights.tolist() == [[[1.0] * 4] * 3] * 4 + [[[2.0] * 4] * 3] * 5
    for mine, theirs in ((half, None), (None, half), (half, single)):
        with pytest.raises(TraceMismatchError, match="has weights of dtype"):
            dataclasses.replace(first, weights=mine).merge(
                dataclasses.replace(delta, weights=theirs)
            )
