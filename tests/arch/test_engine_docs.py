"""docs/engine_performance.md says what the results say, whichever there are."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "write_engine_docs.py"
MADE = {"commit": "c" * 40, "torch": "2", "triton": "3"}


def _document(results: Path, **records: dict[str, object]) -> str:
    for name, record in records.items():
        (results / f"{name}.json").write_text(json.dumps({**MADE, **record}))
    return runpy.run_path(str(SCRIPT))["document"](results)


def _speed(**changes: object) -> dict[str, object]:
    side = {
        "tokens_per_second": 1000.0,
        "seconds": 2.5,
        "decode_step_ms": 4.0,
        "host_us_per_token": 12.0,
    }
    decode = {
        "requests": 32, "prompt_tokens": 512, "new_tokens": 256, "rounds": 4, "on_over_off": 0.9971,
        "interval_95": [0.9951, 0.9992], "bytes_per_row": 385.0, "capture_host_us_per_row": 2.25,
        "full_ring_waits": 0, "full_ring_seconds": 0.0, "on": side, "off": {**side, "tokens_per_second": 1003.0},
        "floor_ms": 3.0, "share_of_floor": 0.75, "device_step_ms": {"on": {"median": 3.95}, "off": {"median": 3.94}},
        "decode_step": {"kernels_us": 3900.0, "largest": {"moe_up": [2000.0, 48]}}, **changes,
    }  # fmt: skip
    prefill = {
        **decode, "requests": 4, "prompt_tokens": 8192, "new_tokens": 1,
        "on": {**side, "seconds": 0.5, "decode_step_ms": float("nan")},
    }  # fmt: skip
    for name in ("floor_ms", "share_of_floor", "decode_step"):
        del prefill[name]
    model = {
        "num_hidden_layers": 48,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "hidden_size": 2048,
        "dtype": "bfloat16",
    }
    return {"device": "GPU", "model": model, "attention": "own kernels", "rows": [decode, prefill]}  # fmt: skip


def test_without_results_it_says_so(tmp_path: Path):
    text = _document(tmp_path)
    assert "No result has been committed yet." in text
    assert "## " not in text


def test_speed_has_ratio_interval_and_share(tmp_path: Path):
    text = _document(tmp_path, engine_gpu_h100=_speed())
    assert "GPU, torch 2, Triton 3, commit cccccccccccc, 48 layers, 128 experts, top 8" in text
    assert (
        "| 32 | 512 + 256 | 1000.0 | 1003.0 | 0.9971 [0.9951, 0.9992], 4 rounds | 4.000 | 3.000 | 75.0% | 12.0 | 3.950 / 3.940 |"
        in text
    )
    assert "| 4 | 8192 | 0.5000 | 2.5000 | 0.9971 [0.9951, 0.9992], 4 rounds | 65536 |" in text
    assert "| 32 | 512 | 256 | 385.000 | 2.250 | 0 | 0.000 |" in text
    assert "| `moe_up` | 2000.0 | 48 |" in text
    assert "nan" not in text.lower()


def test_a_median_stands_beside_a_mean(tmp_path: Path):
    text = _document(tmp_path, engine_gpu=_speed(ratios=[0.98, 0.999, 1.5]))
    assert "| 0.9971 [0.9951, 0.9992], median 0.9990, 4 rounds |" in text


def test_what_l1_cache_is_worth(tmp_path: Path):
    row = {"runner": "capture on", "l1_cache": "asked for", "decode_step_ms": 2.5, "turns_ms": [2.4, 2.5, 2.6]}  # fmt: skip
    text = _document(tmp_path, engine_l1_cache={"device": "GPU", "rows": [row]})
    assert "| capture on | asked for | 2.500 | 3 |" in text


def test_what_was_not_measured_is_left_empty(tmp_path: Path):
    side = {"tokens_per_second": 1.0, "seconds": 1.0, "decode_step_ms": float("nan"), "host_us_per_token": 1.0}  # fmt: skip
    text = _document(tmp_path, engine_gpu=_speed(on=side, share_of_floor=float("nan")))
    assert "| 0.9971 [0.9951, 0.9992], 4 rounds |  | 3.000 |  | 1.0 |" in text


@pytest.mark.parametrize(("same", "said"), [(True, "bit for bit the same"), (False, "NOT THE SAME")])  # fmt: skip
def test_exactness_is_not_taken_for_granted(tmp_path: Path, same: bool, said: str):
    cell = {"cell": "graph + overlap", "requests": 28, "forced_rows_equal": 640, "prefix_hits": 6, "preemptions": 7, "graphs": 1}  # fmt: skip
    record = {"device": "GPU", "dtype": "bfloat16", "model": "tiny-moe", "capture_on_equals_off": same, "cells": [cell]}  # fmt: skip
    text = _document(tmp_path, engine_exactness=record)
    assert said in text
    assert "| graph + overlap | 28 | 640 | 6 | 7 | 1 |" in text


def test_streams_name_their_waits(tmp_path: Path):
    trace = {"forward_waits": 3, "copies_to_host_on_forward": 1, "gap_between_steps_us": {"median": 6.5}, "gather_us": {"median": 1.25}}  # fmt: skip
    streams = {
        "rows_32": {"trace_on": trace, "trace_off": {**trace, "gather_us": None}, "speed_on_over_off": {"median": 0.99, "min": 0.9, "max": 1.0}},
        "stats": {"steps": 4},
    }  # fmt: skip
    text = _document(tmp_path, engine_capture={"gpu": "GPU", "streams": streams, "exact": [{"rows_equal": 5}]})  # fmt: skip
    assert "| rows_32 | 3 | 1 | 6.500 | 6.500 | 1.250 | 0.990 | 0.900 | 1.000 |" in text
    assert "| rows equal |" in text


def test_kernels_have_times_with_percentiles(tmp_path: Path):
    attention = {
        "gpu": "GPU", "checks_passed": {"accuracy": 2}, "sweep": [{"us": 9.0}],
        "accuracy": [{"relative_error": 1e-3}, {"relative_error": 2e-3}],
        "decode": [{"batch": 8, "us": 10.0, "p20": 9.5, "p80": 10.5}],
    }  # fmt: skip
    sampling = {"gpu": "GPU", "equal_in_a_graph": False, "rows": [{"rows": 1, "in_turn": {"median_us": 4.5, "p20_us": 4.0, "p80_us": 5.0}}]}  # fmt: skip
    text = _document(tmp_path, attention=attention, sampling=sampling)
    assert "| 8 | 10.00 [9.50, 10.50] |" in text
    assert "2 cases, worst relative error 2.0e-03" in text
    assert "Sweep" not in text
    assert "equal in a graph: no" in text
    assert "| 1 | 4.50 [4.00, 5.00] |" in text


def test_attention_peers_have_a_column_each_and_reasons(tmp_path: Path):
    ours = {"case": "1 x 512", "entrant": "ours", "us": 10.0, "p20": 9.5, "p80": 10.5, "tb_per_s": 0.105}  # fmt: skip
    ratio = {"ratio": 0.9, "p20": 0.89, "p80": 0.91}
    peer = {**ours, "entrant": "peer", "us": 9.0, "time_over_ours": ratio, "plan_host_us": {"us": 30.0, "p20": 29.0, "p80": 31.0}}  # fmt: skip
    record = {
        "device": "GPU", "flashinfer-python": "0.6",
        "shape": {"heads": 32, "kv_heads": 4, "head_dim": 128, "block_size": 16, "dtype": "bfloat16"},
        "decode": [ours, peer, {**ours, "case": "32 x 512"}], "prefill": [],
        "not_measured": [{"what": "absent", "case": "", "entrant": "fa3", "reason": "no header"}],
    }  # fmt: skip
    text = _document(tmp_path, attention_peers=record)
    assert "commit cccccccccccc, FlashInfer 0.6; 32 query and 4 KV heads of 128" in text
    assert "| sequences x context | ours | peer |" in text
    assert "| 1 x 512 | 10.00 [9.50, 10.50], 0.10 TB/s | 9.00 [9.50, 10.50], 0.10 TB/s, x 0.900 |" in text  # fmt: skip
    assert "| 32 x 512 | 10.00 [9.50, 10.50], 0.10 TB/s |  |" in text
    assert "| 1 x 512 | 30.00 [29.00, 31.00] |" in text
    assert "- fa3: absent: no header" in text
    assert "### Prefill" not in text
