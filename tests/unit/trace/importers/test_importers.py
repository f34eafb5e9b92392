"""Every wire form gives the ids that were sent, position by position, or an error that says what is wrong."""

import json
import pickle

import numpy as np
import pytest

from routing_replay.errors import TraceFormatError
from routing_replay.trace import RoutingTrace
from routing_replay.trace.importers import (
    RoutingDiagnosisError,
    Wire,
    import_megatron,
    import_nemo_rl,
    import_prime_rl,
    import_sglang,
    import_vllm,
    import_vllm_split,
)
from unit.trace.importers.import_cases import (
    MODEL,
    SHAPES,
    nemo_envelope,
    npy_base64,
    random_ids,
    random_tokens,
    sglang_base64,
    struct_of,
)

RNG = np.random.default_rng(5)
TOKENS = random_tokens(RNG, 12)
IDS = random_ids(RNG, 11, MODEL)
MOE = IDS[:, list(MODEL.layer_ids)]


def _check(trace: RoutingTrace, ids: np.ndarray = MOE, start: int = 0) -> None:
    np.testing.assert_array_equal(trace.ids, ids)
    trace.validate(TOKENS)
    assert (trace.start, trace.ordered, trace.is_complete) == (start, False, True)
    assert (trace.layer_ids, trace.num_layers) == (MODEL.layer_ids, MODEL.num_layers)


@pytest.mark.parametrize(
    "form",
    [
        npy_base64(IDS),
        npy_base64(IDS).encode(),
        npy_base64(np.asfortranarray(IDS)),
        npy_base64(IDS.astype(np.uint16)),
        npy_base64(IDS.astype(">i4")),
        IDS,
        IDS.astype(np.int32),
        IDS.tolist(),
        struct_of(IDS),
        struct_of(IDS, start=0),
        {"data": IDS.tobytes(), "shape": IDS.shape, "dtype": "uint8"},
    ],
)
def test_vllm_forms(form: Wire):
    _check(import_vllm(form, token_ids=TOKENS, routing=MODEL))


def test_dense_slots_may_hold_a_range_as_our_own_exports_do():
    ids = IDS.copy()
    ids[:, [0, 3]] = np.arange(4)
    _check(import_vllm(ids, token_ids=TOKENS, routing=MODEL))


def test_rows_from_a_prompt_start():
    _check(import_vllm(npy_base64(IDS[5:]), token_ids=TOKENS, routing=MODEL, prompt_start=5), MOE[5:], 5)  # fmt: skip
    _check(import_vllm(struct_of(IDS[5:], start=5), token_ids=TOKENS, routing=MODEL), MOE[5:], 5)
    with pytest.raises(TraceFormatError, match=r"start is 5 and prompt_start=4"):
        import_vllm(struct_of(IDS[5:], start=5), token_ids=TOKENS, routing=MODEL, prompt_start=4)
    with pytest.raises(RoutingDiagnosisError, match="missing_front_rows"):
        import_vllm(npy_base64(IDS[5:]), token_ids=TOKENS, routing=MODEL)


def test_a_delta_merges_with_what_was_there():
    first = import_vllm(IDS[:7], token_ids=TOKENS[:8], routing=MODEL)
    delta = import_vllm(IDS[6:], token_ids=TOKENS, routing=MODEL, prompt_start=6, weights_version=1)
    merged = first.merge(delta, token_ids=TOKENS)
    _check(merged)
    assert merged.weights_version == ((0, 0), (6, 1))


def test_vllm_split_forms():
    for of_prompt, rest in ((IDS[:8].tolist(), IDS[8:].tolist()), (npy_base64(IDS[:8]), IDS[8:])):
        _check(
            import_vllm_split(
                of_prompt, rest, prompt_token_ids=TOKENS[:8], token_ids=TOKENS, routing=MODEL
            )
        )
    single = import_vllm_split(IDS, None, prompt_token_ids=TOKENS[:11], token_ids=TOKENS, routing=MODEL)  # fmt: skip
    _check(single)
    with pytest.raises(TraceFormatError, match=r"shape \[8, 5, 4\] for a prompt of 7 tokens"):
        import_vllm_split(IDS[:8], IDS[8:], prompt_token_ids=TOKENS[:7], token_ids=TOKENS, routing=MODEL)  # fmt: skip
    with pytest.raises(TraceFormatError, match="must agree in layers and experts"):
        import_vllm_split(IDS[:8], IDS[8:, :, :3], prompt_token_ids=TOKENS[:8], token_ids=TOKENS, routing=MODEL)  # fmt: skip


def test_sglang_forms():
    for form in (sglang_base64(IDS), IDS.astype(np.int32).reshape(-1), IDS):
        _check(import_sglang(form, token_ids=TOKENS, routing=MODEL))
    _check(import_sglang(sglang_base64(IDS[3:]), token_ids=TOKENS, routing=MODEL, start_len=3), MOE[3:], 3)  # fmt: skip
    with pytest.raises(TraceFormatError, match="not a multiple of 5 layers x 4"):
        import_sglang(IDS.reshape(-1)[:-3], token_ids=TOKENS, routing=MODEL)
    with pytest.raises(TraceFormatError, match="not a multiple of 4"):
        import_sglang("AAAA", token_ids=TOKENS, routing=MODEL)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32"])
@pytest.mark.parametrize("all_layers", [True, False])
def test_nemo_rl_envelope(dtype: str, all_layers: bool):
    ids = IDS if all_layers else MOE
    filler = np.broadcast_to(np.arange(4), ids[:1].shape)
    sent = np.concatenate([ids, filler])
    _check(import_nemo_rl(nemo_envelope(sent, dtype), token_ids=TOKENS, routing=MODEL))
    _check(import_nemo_rl(sent.tolist(), token_ids=TOKENS, routing=MODEL))
    holes = sent.astype(np.int64)
    holes[[2, 3, 11]] = -1
    trace = import_nemo_rl(nemo_envelope(holes, dtype), token_ids=TOKENS, routing=MODEL)
    assert np.flatnonzero(~trace.valid).tolist() == [2, 3]
    np.testing.assert_array_equal(trace.ids[trace.valid], MOE[[0, 1, *range(4, 11)]])
    holes[5, list(MODEL.layer_ids)[-1] if all_layers else -1] = -1
    with pytest.raises(TraceFormatError, match="token index 5 holds -1 in some layers alone"):
        import_nemo_rl(nemo_envelope(holes, dtype), token_ids=TOKENS, routing=MODEL)


@pytest.mark.parametrize(
    "envelope",
    ["nrlre1:uint8:1x1x1:AA==", "nrlre2:int8:1x1x1:AA==", "nrlre1:int8:1x1:AA==", "nrlre1:int8:-1x1x1:AA==", "",
     "nrlre1:int8:9999999999999x1x1:AA=="],
)  # fmt: skip
def test_nemo_rl_damaged_envelope(envelope: str):
    with pytest.raises(TraceFormatError, match="accepted is nrlre1"):
        import_nemo_rl(envelope, token_ids=TOKENS, routing=MODEL)


def test_prime_rl_struct():
    doubled = np.concatenate([IDS, IDS[-1:]])
    for sent in (doubled, IDS):
        data = {"data": sent.tobytes(), "shape": list(sent.shape), "dtype": "uint8"}
        _check(import_prime_rl(data, token_ids=TOKENS, routing=MODEL))
    padded = np.concatenate([IDS, np.zeros_like(IDS[:1])])
    with pytest.raises(RoutingDiagnosisError, match="zero_padding"):
        import_prime_rl(struct_of(padded), token_ids=TOKENS, routing=MODEL)


def test_megatron_indices():
    for form in (MOE.astype(np.int16), MOE.astype(np.int32).tolist()):
        _check(import_megatron(form, token_ids=TOKENS, routing=MODEL))
    with pytest.raises(RoutingDiagnosisError, match="layer_axis"):
        import_megatron(IDS, token_ids=TOKENS, routing=MODEL)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_imported_ids_are_those_that_were_sent(name: str):
    routing, rng = SHAPES[name], np.random.default_rng(1)
    ids, tokens = random_ids(rng, 40, routing), random_tokens(rng, 41)
    trace = import_vllm(npy_base64(ids), token_ids=tokens, routing=routing)
    np.testing.assert_array_equal(trace.ids, ids[:, list(routing.layer_ids)])
    assert not np.shares_memory(trace.ids, ids)
    trace.validate(tokens)


def test_one_changed_id_is_another_trace():
    changed = IDS.copy()
    cell = changed[4, 2]
    cell[0] = next(expert for expert in range(32) if expert not in cell)
    one = import_vllm(IDS, token_ids=TOKENS, routing=MODEL)
    other = import_vllm(changed, token_ids=TOKENS, routing=MODEL)
    assert np.argwhere(one.ids != other.ids).tolist() == [[4, 1, 0]]


GOOD = npy_base64(IDS)
DAMAGED = {
    "not base64": ("%%%", "not base64"),
    "cut base64": (GOOD[:-3], "not base64"),
    "cut array": (GOOD[:-8], r"bytes, but shape \[11, 5, 4\]"),
    "no npy": ("AAAA", "no .npy file"),
    "empty": ("", "it is empty"),
    "floats": (npy_base64(IDS.astype(np.float32)), "dtype float32"),
    "unknown dtype": ({**struct_of(IDS), "dtype": "float16"}, "dtype is 'float16'"),
    "no shape": ({"data": "AA==", "dtype": "uint8"}, "shape is None"),
    "negative shape": ({**struct_of(IDS), "shape": [-11, -5, 4]}, r"shape \[-11, -5, 4\]"),
    "lying shape": ({**struct_of(IDS), "shape": [12, 5, 4]}, "220 bytes, but shape"),
    "no data": ({"shape": [1, 1, 1], "dtype": "uint8", "data": 3}, "data is a int"),
    "ragged": ([[[1, 2], [3]]], "no array of integers"),
    "text": ([["a"]], "dtype <U1"),
}


@pytest.mark.parametrize("name", sorted(DAMAGED))
def test_damaged_fields_are_refused(name: str):
    form, message = DAMAGED[name]
    with pytest.raises(TraceFormatError, match=message):
        import_vllm(form, token_ids=TOKENS, routing=MODEL)  # pyright: ignore[reportArgumentType]


def test_pickled_objects_are_never_loaded():
    import base64
    import io

    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(TraceFormatError, match="dtype object"):
        import_vllm(base64.b64encode(buffer.getvalue()), token_ids=TOKENS, routing=MODEL)


def test_bad_tokens_are_refused_before_rows_are_counted():
    for tokens in ([1.5] * 12, [-1] * 12, [[1]] * 12):
        with pytest.raises(TraceFormatError, match="token_ids"):
            import_vllm(IDS, token_ids=tokens, routing=MODEL)  # pyright: ignore[reportArgumentType]


def test_every_byte_flip_and_cut_is_an_import_or_a_clean_error():
    data = bytearray(__import__("base64").b64decode(GOOD))
    rng = np.random.default_rng(0)
    for position in range(len(data)):
        for cut in (False, True):
            damaged = data[:position] if cut else bytearray(data)
            if not cut:
                damaged[position] ^= int(rng.integers(1, 256))
            try:
                trace = import_vllm(bytes(damaged), token_ids=TOKENS, routing=MODEL)
            except TraceFormatError:
                continue
            assert not cut
            trace.validate(TOKENS)


def test_the_error_carries_its_findings_and_pickles():
    with pytest.raises(RoutingDiagnosisError) as caught:
        import_vllm(np.zeros_like(IDS), token_ids=TOKENS, routing=MODEL)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.findings == caught.value.findings
    assert json.loads(json.dumps(again.findings[0].upstream)) == list(again.findings[0].upstream)
