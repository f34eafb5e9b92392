"""Every planted fault is found by name, where it is; correct arrays raise no alarm."""

from collections.abc import Callable

import numpy as np
import pytest

from routing_replay.trace import ModelRouting
from routing_replay.trace.importers import (
    Finding,
    diagnose,
    find_shared_rows,
    import_megatron,
    import_vllm,
)
from unit.trace.importers.import_cases import MODEL, SHAPES, random_ids, random_tokens

NUM_TOKENS = 41


def _array(seed: int = 0, routing: ModelRouting = MODEL) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    return random_ids(rng, NUM_TOKENS - 1, routing), random_tokens(rng, NUM_TOKENS)


def _set(where: object, value: object) -> Callable[[np.ndarray], np.ndarray]:
    def plant(ids: np.ndarray) -> np.ndarray:
        ids[where] = value  # pyright: ignore[reportArgumentType]
        return ids

    return plant


def _shifted(ids: np.ndarray) -> np.ndarray:
    """The layers with a router first, as if the dense ones had not been counted."""
    moe = ids[:, list(MODEL.layer_ids)]
    return np.concatenate([moe, np.zeros_like(ids[:, :2])], axis=1)


def _frozen(ids: np.ndarray) -> np.ndarray:
    ids[20:] = ids[19]
    return ids


def _frozen_layer(ids: np.ndarray) -> np.ndarray:
    ids[10:, 2] = ids[9, 2]
    return ids


# fault: plant, code, row, decoder layer, severity
FAULTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str, int | None, int | None]] = {
    "all zero": (lambda ids: ids * 0, "all_zero", None, None),
    "a layer of zeros": (_set((slice(None), 2), 0), "zero_layers", None, 2),
    "zeros at the end": (_set(slice(30, None), 0), "zero_padding", 30, None),
    "zeros at the front": (_set(slice(None, 7), 0), "zero_front_rows", 0, None),
    "zeros in the middle": (_set([11, 17], 0), "zero_rows", 11, None),
    "zeros in some layers of some rows": (_set((slice(12, 15), 4), 0), "zero_cells", 12, 4),
    "an expert twice": (_set((9, 1), [3, 7, 3, 5]), "duplicate_ids", 9, 1),
    "an id that no expert has": (_set((9, 1, 0), 200), "ids_out_of_range", 9, 1),
    "a physical id": (_set((9, 1, 0), 33), "physical_ids", 9, 1),
    "a negative id": (lambda ids: _set((9, 1), -1)(ids.astype(np.int16)), "negative_ids", 9, 1),
    "layers counted without the dense ones": (_shifted, "layer_offset", None, 0),
    "ids where no router is": (_set((slice(None), 3), [9, 8, 7, 6]), "dense_layer_routes", None, 3),
    "a row too many": (lambda ids: np.concatenate([ids, ids[:1]]), "row_extra", 40, None),
    "a row too few": (lambda ids: ids[1:], "row_missing", 0, None),
    "rows missing at the front": (lambda ids: ids[10:], "missing_front_rows", 0, None),
    "a prefix twice": (lambda ids: np.concatenate([ids[:9], ids]), "row_count", 40, None),
    "a draft layer": (lambda ids: np.concatenate([ids, ids[:, 1:2]], 1), "draft_layers", None, 5),
    "layers with a router alone": (lambda ids: ids[:, [1, 2, 4]], "layer_axis", None, None),
    "layers of another model": (lambda ids: ids[:, :4], "layer_axis", None, None),
    "a shared expert's column": (lambda ids: np.concatenate([ids, ids[..., :1] * 0 + 31], 2), "top_k", None, None),
    "a column lost": (lambda ids: ids[..., :3], "top_k", None, None),
    "the shape lost": (lambda ids: ids.reshape(-1), "shape", None, None),
    "a buffer that nobody wrote": (_frozen, "frozen_rows", 19, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_planted_fault_is_found_by_name(name: str):
    plant, code, row, layer_idx = FAULTS[name]
    ids, tokens = _array()
    assert diagnose(ids, token_ids=tokens, routing=MODEL) == ()
    findings = diagnose(plant(ids.copy()), token_ids=tokens, routing=MODEL)
    assert code in [finding.code for finding in findings], findings
    found = next(finding for finding in findings if finding.code == code)
    assert (found.row, found.layer_idx) == (row, layer_idx)
    assert found.severity == "error"
    assert found.message
    assert found.cause


def test_padding_of_the_row_that_the_last_token_lacks_is_named():
    ids, tokens = _array()
    for row, words in ((ids[:1] * 0, "zeros"), (ids[-1:], "repeats the one before"), (ids[:1] * 0 + np.arange(4, dtype=np.uint8), "0, 1, 2")):  # fmt: skip
        findings = diagnose(np.concatenate([ids, row]), token_ids=tokens, routing=MODEL)
        assert any(f.code == "row_extra" and words in f.cause for f in findings)


def test_wrapped_ids_of_a_byte_are_found():
    routing = SHAPES["qwen3_next"]
    ids, tokens = _array(routing=routing)
    findings = diagnose(ids.astype(np.uint8), token_ids=tokens, routing=routing)
    assert findings[0].code == "dtype_too_narrow"


def test_still_layers_among_others_are_a_warning():
    ids, tokens = _array()
    findings = diagnose(_frozen_layer(ids), token_ids=tokens, routing=MODEL)
    assert [(f.code, f.severity, f.row, f.layer_idx) for f in findings] == [("frozen_rows", "warning", 9, 2)]  # fmt: skip
    ids[10:, 1] = ids[9, 1]
    (found,) = diagnose(ids, token_ids=tokens, routing=MODEL)
    assert (found.severity, found.values) == ("warning", (1, 2))
    import_vllm(ids, token_ids=tokens, routing=MODEL)  # a warning refuses nothing


def test_repeated_tokens_may_repeat_their_experts():
    ids, tokens = _array()
    tokens[19:] = [7] * len(tokens[19:])
    assert diagnose(_frozen(ids), token_ids=tokens, routing=MODEL) == ()


def test_every_place_of_several_faults_is_named():
    ids, tokens = _array()
    ids[:, 2] = 0
    ids[35:] = 0
    ids[3, 1] = [5, 5, 6, 7]
    codes = [f.code for f in diagnose(ids, token_ids=tokens, routing=MODEL)]
    assert codes == ["zero_layers", "zero_padding", "duplicate_ids"]


@pytest.mark.parametrize("rows_of_zero", [1, 2, 3])
def test_expert_zero_is_a_fair_choice_where_one_is_picked(rows_of_zero: int):
    routing = SHAPES["small"]
    ids, tokens = _array(routing=routing)
    ids[5 : 5 + rows_of_zero] = 0
    assert diagnose(ids, token_ids=tokens, routing=routing) == ()


def test_expert_zero_everywhere_is_not():
    routing = SHAPES["llama4_scout"]
    ids, tokens = _array(routing=routing)
    (found,) = diagnose(ids * 0, token_ids=tokens, routing=routing)
    assert found.code == "all_zero"
    ids[:, 7] = 0
    (found,) = diagnose(ids, token_ids=tokens, routing=routing)
    assert (found.code, found.severity, found.layer_idx) == ("zero_layers", "warning", 7)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_correct_arrays_raise_no_alarm(name: str):
    routing = SHAPES[name]
    rng = np.random.default_rng(3)
    requests = {}
    for index in range(170):  # 6 shapes: 1,020 arrays
        num_tokens = int(rng.integers(1, 90))
        tokens = random_tokens(rng, num_tokens)
        if index % 3 == 0:  # repeating text
            tokens = (tokens[:4] * num_tokens)[:num_tokens]
        ids = random_ids(rng, num_tokens - 1, routing)
        if index % 5 == 0:  # a router that likes few experts
            ids[:, list(routing.layer_ids)[:1]] = ids[:1, list(routing.layer_ids)[:1]] if len(ids) and index % 2 else ids[:, list(routing.layer_ids)[:1]]  # fmt: skip
        findings = diagnose(ids, token_ids=tokens, routing=routing)
        assert [f for f in findings if f.severity == "error"] == [], findings
        requests[str(index)] = (import_vllm(ids, token_ids=tokens, routing=routing), tokens)
    assert find_shared_rows(requests) == ()


def _requests(name: str = "qwen3_30b") -> dict[str, tuple[np.ndarray, list[int]]]:
    rng, routing = np.random.default_rng(9), SHAPES[name]
    return {key: (random_ids(rng, 60, routing), random_tokens(rng, 61)) for key in ("a", "b", "c")}


def _shared(arrays: dict[str, tuple[np.ndarray, list[int]]], name: str = "qwen3_30b") -> tuple[Finding, ...]:  # fmt: skip
    return find_shared_rows(
        {
            key: (import_vllm(ids, token_ids=tokens, routing=SHAPES[name]), tokens)
            for key, (ids, tokens) in arrays.items()
        }
    )


@pytest.mark.parametrize("shift", [0, 13])
def test_rows_of_another_request_are_found(shift: int):
    arrays = _requests()
    assert _shared(arrays) == ()
    arrays["c"][0][30:40] = arrays["a"][0][30 - shift : 40 - shift]
    (found,) = _shared(arrays)
    assert (found.code, found.row, found.values) == ("rows_of_another_request", 30, (30, 30 - shift, 10))  # fmt: skip
    assert "'c' holds 10 rows of request 'a'" in found.message


def test_equal_rows_here_and_there_are_likeness():
    arrays = _requests()
    for row in (3, 9, 11, 20, 21, 22, 40, 50, 51):
        arrays["c"][0][row] = arrays["a"][0][row]
    assert _shared(arrays) == ()


def test_a_shared_prefix_shares_its_rows_rightly():
    arrays = _requests()
    arrays["b"] = (
        np.concatenate([arrays["a"][0][:40], arrays["b"][0][40:]]),
        arrays["a"][1][:40] + arrays["b"][1][40:],
    )
    assert _shared(arrays) == ()


def test_few_equal_rows_of_a_tiny_model_are_chance():
    arrays = _requests("small")
    arrays["c"][0][10:50] = arrays["a"][0][10:50]
    assert _shared(arrays, "small") == ()  # 40 rows of 4 bits; 64 would be needed
    longer = {
        key: (np.tile(ids, (2, 1, 1)), tokens + tokens[1:]) for key, (ids, tokens) in arrays.items()
    }
    longer["c"][0][5:105] = longer["a"][0][5:105]
    arrays = longer
    assert [f.code for f in _shared(arrays, "small")] == ["rows_of_another_request"]


def test_invalid_rows_are_not_compared():
    routing, rng = SHAPES["mixtral"], np.random.default_rng(2)
    traces = {}
    for key in ("a", "b"):
        tokens = random_tokens(rng, 61)
        trace = import_megatron(random_ids(rng, 60, routing, all_layers=False), token_ids=tokens, routing=routing)  # fmt: skip
        hole = type(trace).from_rows(trace.ids, token_ids=tokens, layer_ids=trace.layer_ids, num_layers=32, num_experts=8,
                                     valid=np.arange(60) < 20)  # fmt: skip
        traces[key] = (hole, tokens)
    assert find_shared_rows(traces) == ()


def test_no_requests_share_nothing():
    assert find_shared_rows({}) == ()
