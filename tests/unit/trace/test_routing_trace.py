import copy
import dataclasses
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given

from routing_replay.errors import TraceFormatError, TraceMismatchError
from routing_replay.trace import RoutingTrace, token_digests
from unit.trace.trace_cases import invalid_rows, random_ids, random_trace, tokens_of, traces


@given(traces())
def test_from_rows_builds_a_valid_trace(trace: RoutingTrace):
    trace.validate()
    assert trace.end == trace.start + trace.num_rows
    assert trace.is_complete == all(trace.valid.tolist())
    per_id = trace.ids.itemsize + (0 if trace.weights is None else trace.weights.itemsize)
    assert trace.nbytes == trace.ids.size * per_id + trace.num_rows * 5
    assert repr(trace).startswith("RoutingTrace(tokens=[")


@pytest.mark.parametrize(
    ("num_experts", "dtype"), [(8, np.uint8), (256, np.uint8), (257, np.uint16), (512, np.uint16)]
)
@pytest.mark.parametrize("given_dtype", [np.int16, np.uint16, np.int64, np.uint64])
def test_from_rows_keeps_ids_and_their_order(num_experts: int, dtype: type, given_dtype: type):
    ids = random_ids(1, rows=5, layers=2, num_experts=num_experts, top_k=8)
    strided = np.asfortranarray(ids.astype(given_dtype))
    trace = RoutingTrace.from_rows(
        strided, token_ids=range(6), layer_ids=[0, 3], num_layers=4, num_experts=num_experts
    )
    assert trace.ids.dtype == dtype
    assert trace.ids.tolist() == ids.tolist()
    assert trace.top_k == 8
    trace.validate(range(6))


def test_from_rows_refuses_a_missing_row_that_is_not_marked():
    ids = random_ids(1, rows=3, layers=2, num_experts=64, top_k=2)
    ids[1, 1, 0] = -1
    fields = {"token_ids": [1, 2, 3], "layer_ids": [0, 1], "num_layers": 2, "num_experts": 64}
    with pytest.raises(TraceFormatError, match=r"ids\[1, 1, 0\] = -1 \(token index 1\)"):
        RoutingTrace.from_rows(ids, **fields)
    trace = RoutingTrace.from_rows(ids, valid=[True, False, True], **fields)
    assert trace.ids[1].tolist() == [[0, 1], [0, 1]]
    assert not trace.is_complete
    trace.validate([1, 2, 3])


@pytest.mark.parametrize("wrapped", [256, 257, 65536 + 3])
def test_from_rows_refuses_ids_that_narrowing_would_wrap(wrapped: int):
    ids = np.array([[[0, wrapped]]])
    with pytest.raises(TraceFormatError, match=f"= {wrapped} "):
        RoutingTrace.from_rows(
            ids, token_ids=[1], layer_ids=[0], num_layers=1, num_experts=min(wrapped, 256)
        )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"token_ids": [1, 2]}, TraceMismatchError, "at least 7 tokens"),
        ({"token_ids": [-1] * 7}, TraceFormatError, r"token_ids\[0\] = -1"),
        ({"valid": [True]}, TraceFormatError, r"bool of shape \[7\]"),
        ({"valid": [1] * 7}, TraceFormatError, "int64"),
        ({"weights": np.zeros((7, 3, 4))}, TraceFormatError, "float16 or float32"),
        ({"weights": np.zeros((6, 3, 4), np.float32)}, TraceFormatError, r"\[6, 3, 4\]"),
        ({"weights": np.zeros((7, 3, 3), np.float32)}, TraceFormatError, r"\[rows, 3, 4\]|\[7, 3"),
        ({"layer_ids": [1, 1, 2]}, TraceFormatError, r"layer_ids\[1\] = 1"),
        ({"layer_ids": [0, 1, 6]}, TraceFormatError, r"layer_ids\[2\] = 6"),
        ({"layer_ids": [-1, 1, 2]}, TraceFormatError, r"layer_ids\[0\] = -1"),
        ({"layer_ids": [0, 1]}, TraceFormatError, r"\[rows, 2, 4\]"),
        ({"num_experts": 0}, TraceFormatError, "num_experts"),
        ({"start": -1, "token_ids": range(7)}, TraceFormatError, "start"),
        ({"weights_version": -1}, TraceFormatError, "weights_version"),
        ({"weights_version": []}, TraceFormatError, "start = 0"),
        ({"weights_version": [(1, 0)]}, TraceFormatError, "start = 0"),
        ({"weights_version": [(0, 0), (3, 0)]}, TraceFormatError, "different versions"),
        ({"weights_version": [(0, 0), (3, 1), (3, 2)]}, TraceFormatError, "increase"),
        ({"weights_version": [(0, 0), (7, 1)]}, TraceFormatError, "token_idx 7"),
        ({"weights_version": [(0, 0, 1)]}, TraceFormatError, r"weights_version\[0\]"),
    ],
)
def test_from_rows_refuses_bad_arguments(
    changes: dict[str, object], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        random_trace(**changes)


@pytest.mark.parametrize("valid", [None, [False, False]])
def test_from_rows_refuses_more_columns_than_experts(valid: list[bool] | None):
    ids = np.zeros((2, 1, 4), dtype=np.int16)
    with pytest.raises(TraceFormatError, match="top_k = 4 columns but num_experts = 3"):
        RoutingTrace.from_rows(
            ids, token_ids=[1, 2], layer_ids=[0], num_layers=1, num_experts=3, valid=valid
        )


@pytest.mark.parametrize("ids", [np.zeros((2, 2)), np.zeros((1, 1, 1)), np.ones((1, 1, 1), bool)])
def test_from_rows_refuses_ids_of_another_form(ids: np.ndarray):
    with pytest.raises(TraceFormatError, match=r"pass integers of shape \[rows"):
        RoutingTrace.from_rows(ids, token_ids=[1, 2], layer_ids=[0], num_layers=1, num_experts=8)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ids", np.zeros((7, 3, 4), np.int16), "dtype int16"),
        ("ids", np.zeros((7, 3, 4), np.uint16), "must be uint8"),
        ("ids", np.zeros((7, 3, 5), np.uint8), "shape"),
        ("ids", np.zeros((7, 12), np.uint8), "shape"),
        ("ids", np.zeros((7, 4, 3), np.uint8).transpose(0, 2, 1), "not contiguous"),
        ("ids", np.ma.masked_array(np.zeros((7, 3, 4), np.uint8)), "MaskedArray"),
        ("ids", [[[0]]], "list"),
        ("valid", np.ones(7, np.uint8), "dtype uint8"),
        ("valid", np.ones(6, bool), "shape"),
        ("valid", np.ones(14, bool)[::2], "not contiguous"),
        ("token_digest", np.zeros(7, ">u4"), "native byte order"),
        ("token_digest", np.zeros(8, np.uint32), "shape"),
        ("weights", np.zeros((7, 3, 4), np.float64), "float16 or float32"),
        ("start", True, "start = True"),
        ("start", np.int64(0), "int64"),
        ("start", 2**63 - 3, "exceeds"),
        ("top_k", 4.0, "top_k"),
        ("layer_ids", (), "non-empty"),
        ("layer_ids", [1, 3, 5], "tuple"),
        ("layer_ids", (True, 3, 5), r"layer_ids\[0\] = True"),
        ("ordered", 1, "ordered = 1"),
        ("weights_version", [(0, 0)], "tuple"),
        ("weights_version", ((0, True),), r"weights_version\[0\]"),
        ("weights_version", ([0, 1],), r"weights_version\[0\]"),
    ],
)
def test_constructor_refuses_another_structure(field: str, value: object, message: str):
    with pytest.raises(TraceFormatError, match=message):
        dataclasses.replace(random_trace(), **{field: value})


@pytest.mark.parametrize(("num_experts", "top_k"), [(64, 4), (200, 40), (300, 4), (300, 40)])
def test_validate_refuses_bad_content(num_experts: int, top_k: int):
    trace = random_trace(num_experts=num_experts, top_k=top_k, start=5)
    trace.validate()
    ids = trace.ids.copy()
    ids[2, 1, 0] = num_experts
    with pytest.raises(TraceFormatError, match=rf"ids\[2, 1, 0\] = {num_experts} .*index 7, dec"):
        dataclasses.replace(trace, ids=ids).validate()
    ids = trace.ids.copy()
    ids[6, 2, top_k - 1] = ids[6, 2, 1]
    with pytest.raises(TraceFormatError, match=r"ids\[6, 2\] = .*index 11, .* repeats an expert"):
        dataclasses.replace(trace, ids=ids).validate()


def test_validate_finds_a_bad_id_in_a_later_chunk(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("routing_replay.trace._checks._CHUNK_IDS", 24)
    trace = random_trace()
    trace.validate()
    ids = trace.ids.copy()
    ids[6, 2, 3] = 64
    with pytest.raises(TraceFormatError, match=r"ids\[6, 2, 3\] = 64 \(token index 6"):
        dataclasses.replace(trace, ids=ids).validate()


def test_validate_refuses_an_invalid_row_that_holds_ids():
    trace = invalid_rows(random_trace(weights=np.ones((7, 3, 4), np.float16)), [2, 5])
    trace.validate()
    ids = trace.ids.copy()
    ids[5, 1] = ids[5, 1, ::-1]
    with pytest.raises(TraceFormatError, match=r"row 5 \(token index 5\) is marked invalid"):
        dataclasses.replace(trace, ids=ids).validate()
    weights = trace.weights.copy()
    weights[2, 0, 0] = 1
    with pytest.raises(TraceFormatError, match=r"row 2 .* weights other than 0"):
        dataclasses.replace(trace, weights=weights).validate()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_validate_refuses_weights_that_are_not_finite(value: float):
    weights = np.ones((7, 3, 4), dtype=np.float32)
    weights[3, 1, 2] = value
    with pytest.raises(TraceFormatError, match=r"weights\[3, 1, 2\] = .*not finite"):
        random_trace(weights=weights).validate()


@pytest.mark.parametrize("start", [0, 4])
def test_validate_names_the_first_token_that_differs(start: int):
    trace = random_trace(start=start)
    tokens = tokens_of(0, start + 9)
    for length in (start + 7, start + 8, start + 9):
        assert trace.validate(tokens[:length]) is None
    for at in range(start, start + 7):
        other = [*tokens[:at], tokens[at] + 1, *tokens[at + 1 :]]
        where = "at or before" if at == start and start > 0 else "at"
        with pytest.raises(TraceMismatchError, match=f"difference is {where} token index {at} "):
            trace.validate(other)
    trace.validate([*tokens[: start + 7], 1, 2])


def test_validate_refuses_other_tokens_before_the_first_row():
    trace = random_trace(start=4)
    tokens = tokens_of(0, 11)
    tokens[0] += 1
    with pytest.raises(TraceMismatchError, match="at or before token index 4 "):
        trace.validate(tokens)


def test_validate_refuses_too_few_tokens():
    with pytest.raises(TraceMismatchError, match=r"has 6 tokens .* up to token index 6"):
        random_trace().validate(tokens_of(0, 6))


def test_token_digest_is_checkable_from_any_row():
    trace, tokens = random_trace(start=3), tokens_of(0, 10)
    for row in range(6):
        rest = token_digests(tokens[4 + row :], previous=int(trace.token_digest[row]))
        assert rest.tolist() == trace.token_digest[row + 1 :].tolist()


def test_trace_does_not_change_with_the_arrays_it_was_built_from():
    arrays = {
        "ids": np.zeros((20, 3, 4), np.uint8)[2:9],
        "valid": np.ones(20, bool)[2:9],
        "token_digest": np.zeros(20, np.uint32)[2:9],
        "weights": np.ones((20, 3, 4), np.float32)[2:9],
    }
    trace = dataclasses.replace(random_trace(), **arrays)
    for name, array in arrays.items():
        before = getattr(trace, name).tolist()
        array[...] = 7
        assert getattr(trace, name).tolist() == before
        assert array.flags.writeable


def test_trace_arrays_are_owned_and_read_only():
    trace = random_trace(weights=np.ones((7, 3, 4), np.float32))
    pieces = [
        trace,
        trace.slice(1, 3),
        trace.truncate(2),
        trace.slice(0, 3).merge(trace.slice(3, 7)),
    ]
    pieces += [copy.deepcopy(trace), copy.copy(trace), pickle.loads(pickle.dumps(trace))]
    for piece in pieces:
        for name in ("ids", "valid", "token_digest", "weights"):
            array = getattr(piece, name)
            assert array.flags.owndata
            assert array.base is None
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        trace.start = 1


@given(traces())
def test_trace_survives_pickle_and_copies(trace: RoutingTrace):
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        assert pickle.loads(pickle.dumps(trace, protocol)).equals(trace)
    assert copy.deepcopy(trace).equals(trace)
    assert copy.copy(trace).equals(trace)


@pytest.mark.parametrize(
    "changes",
    [
        {"start": 0},
        {"num_layers": 7},
        {"layer_ids": (1, 3, 4)},
        {"num_experts": 65},
        {"ordered": False},
        {"weights_version": ((1, 1),)},
        {"weights": None},
        {"weights": np.full((7, 3, 4), 0.5, np.float32)},
        {"weights": np.full((7, 3, 4), -0.0, np.float16)},
        {"token_digest": np.zeros(7, np.uint32)},
    ],
)
def test_equals_tells_every_field_apart(changes: dict[str, object]):
    trace = random_trace(start=1, weights=np.zeros((7, 3, 4), np.float16))
    if "start" in changes:
        changes = {**changes, "weights_version": ((0, 0),)}
    other = dataclasses.replace(trace, **changes)
    assert trace.equals(dataclasses.replace(trace))
    assert not trace.equals(other)
    assert not other.equals(trace)


def test_equals_is_sensitive_to_one_id_and_one_valid_bit():
    trace = random_trace(num_experts=300)
    ids = trace.ids.copy()
    ids[3, 1, 2] ^= 256
    assert not trace.equals(dataclasses.replace(trace, ids=ids))
    assert not trace.equals(invalid_rows(trace, [6]))
    assert not trace.equals(trace.slice(0, 6))
    assert not trace.equals("trace")


def test_import_loads_numpy_alone():
    code = (
        "import sys, routing_replay.trace;"
        "print([name for name in ('torch', 'triton', 'transformers', 'zstandard', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("num_experts", [64, 300])
def test_to_torch_gives_int64_ids_that_share_no_memory(num_experts: int):
    import torch

    trace = invalid_rows(random_trace(num_experts=num_experts), [3])
    for device in (None, "cpu", torch.device("cpu")):
        tensors = trace.to_torch(device)
        assert tensors.ids.dtype == torch.int64
        assert tensors.ids.is_contiguous()
        assert tensors.ids.tolist() == trace.ids.tolist()
        assert tensors.valid.tolist() == trace.valid.tolist()
        tensors.ids.fill_(-1)
        tensors.valid.fill_(False)
        trace.validate(tokens_of(0, 7))
