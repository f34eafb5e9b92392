"""Arrays for trainers: every id where the contract puts it, and nothing that the trainer could not tell from one."""

from collections.abc import Callable

import numpy as np
import pytest

from routing_replay.errors import ConfigError, TraceFormatError, TraceMismatchError
from routing_replay.trace import RoutingTrace
from routing_replay.trace.export import (
    to_areal,
    to_miles,
    to_ms_swift,
    to_prime_rl,
    to_skyrl,
    to_slime,
    to_verl,
)
from unit.trace.trace_cases import invalid_rows, random_trace, tokens_of

Export = Callable[..., np.ndarray]
TARGETS: dict[str, tuple[Export, type]] = {
    "verl": (to_verl, np.int16),
    "slime": (to_slime, np.int32),
    "miles": (to_miles, np.int32),
    "ms-swift": (to_ms_swift, np.int64),
}
MODELS = [(8, 2), (64, 8), (128, 8), (256, 8), (257, 6), (512, 10), (4, 1)]


def expected(trace: RoutingTrace, *, num_rows: int) -> np.ndarray:
    """All decoder layers of the first rows, written one id at a time."""
    every = np.full((num_rows, trace.num_layers, trace.top_k), -7)
    for row in range(num_rows):
        for layer_idx in range(trace.num_layers):
            for column in range(trace.top_k):
                if layer_idx in trace.layer_ids:
                    slot = trace.layer_ids.index(layer_idx)
                    every[row, layer_idx, column] = trace.ids[row, slot, column]
                else:
                    every[row, layer_idx, column] = column
    return every


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("num_experts", "top_k"), MODELS)
def test_array_has_every_id_in_its_place(name: str, num_experts: int, top_k: int):
    export, dtype = TARGETS[name]
    trace = random_trace(1, num_experts=num_experts, top_k=top_k)
    array = export(trace, num_tokens=8)
    assert (array.dtype, array.shape) == (dtype, (7, 6, top_k))
    assert array.flags.c_contiguous
    assert np.array_equal(array, expected(trace, num_rows=7))


@pytest.mark.parametrize("name", TARGETS)
def test_array_leaves_the_row_of_the_last_token_out(name: str):
    export, _ = TARGETS[name]
    trace = random_trace(1)
    assert np.array_equal(export(trace, num_tokens=7), expected(trace, num_rows=6))


@pytest.mark.parametrize("name", TARGETS)
def test_array_shares_no_memory_with_the_trace(name: str):
    export, _ = TARGETS[name]
    trace = random_trace(1, layer_ids=range(3), num_layers=3)
    array = export(trace, num_tokens=8)
    assert not np.shares_memory(array, trace.ids)
    array[:] = 0
    trace.validate(tokens_of(1, 7))


@pytest.mark.parametrize("export", [*(export for export, _ in TARGETS.values()), to_areal])
def test_missing_row_is_refused_with_its_token(export: Export):
    trace = random_trace(1)
    for gap in range(7):
        with pytest.raises(TraceMismatchError, match=f"token index {gap} is missing"):
            export(invalid_rows(trace, [gap]), num_tokens=8)
    with pytest.raises(TraceMismatchError, match="token index 0 is missing"):
        export(random_trace(1, start=2), num_tokens=10)
    with pytest.raises(TraceMismatchError, match="token index 7 is missing"):
        export(trace, num_tokens=9)


@pytest.mark.parametrize("export", [*(export for export, _ in TARGETS.values()), to_areal])
def test_missing_row_of_the_last_token_is_none(export: Export):
    whole, gap = random_trace(1), invalid_rows(random_trace(1), [6])
    assert np.array_equal(export(gap, num_tokens=7), export(whole, num_tokens=7))


@pytest.mark.parametrize("export", [*(export for export, _ in TARGETS.values()), to_areal])
def test_trace_that_is_longer_than_the_sequence_is_refused(export: Export):
    with pytest.raises(TraceMismatchError, match=r"token index 6 but num_tokens=6.*truncate\(6\)"):
        export(random_trace(1), num_tokens=6)
    with pytest.raises(ConfigError, match="num_tokens=0"):
        export(random_trace(1), num_tokens=0)


@pytest.mark.parametrize("export", [*(export for export, _ in TARGETS.values()), to_areal])
def test_repeated_ids_are_refused(export: Export):
    ids = random_trace(1).ids.copy()
    ids[3, 1, 0] = ids[3, 1, 2]
    bad = RoutingTrace.from_rows(
        ids,
        token_ids=tokens_of(1, 7),
        layer_ids=(1, 3, 5),
        num_layers=6,
        num_experts=64,
    )
    with pytest.raises(TraceFormatError):
        export(bad, num_tokens=8)


def test_verl_refuses_more_experts_than_its_dtype_holds():
    rows = {"token_ids": [1], "layer_ids": [0], "num_layers": 1}
    trace = RoutingTrace.from_rows(np.array([[[0, 32767]]]), num_experts=32768, **rows)
    assert to_verl(trace, num_tokens=2).tolist() == [[[0, 32767]]]
    larger = RoutingTrace.from_rows(np.array([[[0, 5]]]), num_experts=32769, **rows)
    with pytest.raises(TraceMismatchError, match=r"int16, up to 32767, .* num_experts=32769"):
        to_verl(larger, num_tokens=2)
    widest = RoutingTrace.from_rows(np.array([[[0, 65535]]]), num_experts=65536, **rows)
    assert to_slime(widest, num_tokens=2).tolist() == [[[0, 65535]]]


def test_areal_joins_layers_and_columns():
    trace = random_trace(1)
    array = to_areal(trace, num_tokens=8)
    assert (array.dtype, array.shape) == (np.int32, (7, 6 * 4))
    assert np.array_equal(array.reshape(7, 6, 4), expected(trace, num_rows=7))


def test_miles_writes_missing_rows_only_where_the_caller_says_so():
    trace = invalid_rows(random_trace(1, start=2), [3])
    array = to_miles(trace, num_tokens=11, on_missing="arange")
    assert array.dtype == np.int32
    gaps = [row for row in range(10) if (array[row] == -1).any()]
    assert gaps == [0, 1, 5, 9]
    assert all((array[row] == -1).all() for row in gaps)
    whole = expected(trace, num_rows=7)
    kept = [0, 1, 2, 4, 5, 6]
    assert np.array_equal(array[[row + 2 for row in kept]], whole[kept])
    with pytest.raises(ConfigError, match="on_missing='native' is not offered by miles"):
        to_miles(trace, num_tokens=11, on_missing="native")


@pytest.mark.parametrize(("num_experts", "dtype"), [(8, "uint8"), (256, "uint8"), (257, "uint16")])
def test_prime_rl_has_a_row_for_every_token(num_experts: int, dtype: str):
    trace = random_trace(1, num_experts=num_experts)
    struct = to_prime_rl(trace, num_tokens=8)
    assert set(struct) == {"data", "shape", "dtype"}
    assert (struct["shape"], struct["dtype"]) == ([8, 6, 4], dtype)
    array = np.frombuffer(struct["data"], np.dtype(dtype).newbyteorder("<")).reshape(8, 6, 4)
    whole = expected(trace, num_rows=7)
    assert np.array_equal(array[:7], whole)
    assert np.array_equal(array[7], whole[6])


def test_prime_rl_takes_the_last_row_where_the_trace_has_it():
    trace = random_trace(1)
    own = np.frombuffer(to_prime_rl(trace, num_tokens=7)["data"], np.uint8).reshape(7, 6, 4)
    assert np.array_equal(own, expected(trace, num_rows=7))
    gap = to_prime_rl(invalid_rows(trace, [6]), num_tokens=7)
    repeated = np.frombuffer(gap["data"], np.uint8).reshape(7, 6, 4)
    assert np.array_equal(repeated, own[[0, 1, 2, 3, 4, 5, 5]])


def test_prime_rl_refuses_gaps_and_a_token_without_rows():
    with pytest.raises(TraceMismatchError, match="token index 3 is missing"):
        to_prime_rl(invalid_rows(random_trace(1), [3]), num_tokens=8)
    with pytest.raises(TraceMismatchError, match="a sequence of one token has no row"):
        to_prime_rl(random_trace(1, rows=0), num_tokens=1)


@pytest.mark.parametrize(
    ("ids", "num_experts", "dtype"),
    [([255, 0], 512, np.uint8), ([256, 0], 512, np.int16), ([32767, 1], 65536, np.int16),
     ([32768, 1], 65536, np.int32)],
)  # fmt: skip
def test_skyrl_takes_the_dtype_of_the_largest_id(ids: list[int], num_experts: int, dtype: type):
    trace = RoutingTrace.from_rows(
        np.array([[ids]]), token_ids=[4], layer_ids=[0], num_layers=1, num_experts=num_experts
    )
    array = to_skyrl(trace, num_tokens=2)
    assert array.dtype == dtype
    assert array.tolist() == [[ids]]


def test_skyrl_ends_before_a_gap_that_no_target_needs():
    trace = invalid_rows(random_trace(1), [4])
    whole = expected(trace, num_rows=7)
    # Token 5 is the first whose prediction needs row 4.
    mask = [0, 0, 1, 1, 1, 0, 0, 0]
    assert np.array_equal(to_skyrl(trace, num_tokens=8, loss_mask=mask), whole[:4])
    assert np.array_equal(
        to_skyrl(random_trace(1), num_tokens=8, loss_mask=mask),
        expected(random_trace(1), num_rows=7),
    )
    for target in (5, 6, 7):
        needed = [*mask[:target], 1, *mask[target + 1 :]]
        with pytest.raises(TraceMismatchError, match="token index 4 is missing"):
            to_skyrl(trace, num_tokens=8, loss_mask=needed)
    with pytest.raises(TraceMismatchError, match="token index 4 is missing"):
        to_skyrl(trace, num_tokens=8)
    assert len(to_skyrl(random_trace(1), num_tokens=12, loss_mask=[0, 1] + [0] * 10)) == 7


def test_skyrl_refuses_what_it_cannot_replay():
    with pytest.raises(ConfigError, match="loss_mask has 7 entries for 8 tokens"):
        to_skyrl(random_trace(1), num_tokens=8, loss_mask=[0] * 7)
    with pytest.raises(TraceMismatchError, match="no row precedes token index 1"):
        to_skyrl(random_trace(1, start=1), num_tokens=9, loss_mask=[0] * 9)
    with pytest.raises(TraceMismatchError, match="no row precedes token index 1"):
        to_skyrl(random_trace(1, rows=0), num_tokens=1)
