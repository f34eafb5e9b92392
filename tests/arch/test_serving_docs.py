"""The tables of docs/serving.md say what the results say."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "write_serving_docs.py"
MADE = {
    "commit": "c0ffee", "machine": {"cpu": "CPU", "cores": 2, "load_average_at_start": 0.25},
    "versions": {"torch": "2", "python": "3.11"}, "model": "tiny-moe",
}  # fmt: skip
RATIO = {"median": 0.981, "interval_95": [0.97, 0.99], "rounds": 8, "all": []}
TIMES = {"p50_ms": 1.25, "p99_ms": 9.5, "max_ms": 12.0}


def _document(results: Path, **records: dict[str, object]) -> str:
    for name, record in records.items():
        (results / f"{name}.json").write_text(json.dumps({**MADE, **record}))
    text = (ROOT / "docs" / "serving.md").read_text()
    return runpy.run_path(str(SCRIPT))["filled"](text, results)


def test_without_results_every_section_says_so(tmp_path: Path):
    assert _document(tmp_path).count("No result has been committed yet.") == 8


@pytest.mark.parametrize(("differs", "said"), [(True, "differs."), (False, "DOES NOT DIFFER.")])
def test_load_has_losses_ratios_and_forms(tmp_path: Path, differs: bool, said: str):
    stream = {"time_to_first_token": TIMES, "between_tokens": TIMES}
    record = {
        "rows": {"requests": 10000, "streams": 256, "lost": 1, "other_tokens": 2, "mixed_up": 3, "rows_equal": 999, "twin_differs": differs},
        "cost": {
            "concurrency": 256, "max_tokens": 32, "requests_a_round": 1024,
            "tokens_per_second": {"no capture": 1000.4, "captured": 990.0, "returned": 985.0},
            "returned_over_captured": RATIO, "returned_over_no_capture": RATIO,
            "cpu_us_a_token": {"no capture": 800.0, "captured": 810.0, "returned": 823.4},
            "cpu_returned_over_captured": {**RATIO, "median": 1.017}, "cpu_returned_over_no_capture": {**RATIO, "median": 1.029},
            "streams": {"captured": stream, "returned": stream},
        },
        "formats": [{"format": "vllm", "bytes_a_row": 85.33, "ms_alone": {"median": 0.5, "interval_95": [-0.25, 1.5]}, "throughput": RATIO,
                     "cpu": {**RATIO, "median": 1.023}}],
    }  # fmt: skip
    text = _document(tmp_path, serving_load=record)
    assert (
        "1 lost, 2 with other tokens, 3 with other rows than offline generation; 999 rows" in text
    )
    assert said in text
    assert (
        "| 985 | 0.981 [0.970, 0.990], 8 rounds | 0.981 [0.970, 0.990], 8 rounds | 823 | 1.017 ["
        in text
    )
    assert "8 rounds | 1.029 [0.970, 0.990], 8 rounds |" in text
    assert "| returned | 1.2 | 9.5 | 1.2 | 9.5 |" in text
    assert (
        "| vllm | 85.3 | 0.50 [-0.25, 1.50] | 0.981 [0.970, 0.990], 8 rounds | 1.023 [0.970, 0.990], 8 rounds |"
        in text
    )
    assert (
        "CPU, 2 cores, load average 0.2 at the start, torch 2, Python 3.11, commit c0ffee" in text
    )


def test_a_phase_that_was_measured_earlier_has_its_own_commit(tmp_path: Path):
    rows = {"requests": 1, "streams": 1, "lost": 0, "other_tokens": 0, "mixed_up": 0, "rows_equal": 9, "twin_differs": True}  # fmt: skip
    formats = [{"format": "vllm", "bytes_a_row": 1.0, "ms_alone": {"median": 0.5, "interval_95": [0.0, 1.0]}, "throughput": RATIO, "cpu": RATIO}]  # fmt: skip
    record = {"commits": {"rows": "earlier", "formats": "c0ffee"}, "rows": rows, "formats": formats}
    text = _document(tmp_path, serving_load=record)
    assert text.count("commit earlier") == 1
    assert text.count("commit c0ffee") == 1


def test_a_load_without_a_phase_says_so(tmp_path: Path):
    assert _document(tmp_path, serving_load={}).count("No result has been committed yet.") == 8


def test_making_a_form_has_both_lengths(tmp_path: Path):
    short = {"format": "vllm", "bytes_a_row": 512.34, "us_a_row": 0.904, "ms_a_response": 0.69}
    long = {"format": "vllm", "bytes_a_row": 512.01, "us_a_row": 0.196, "ms_a_response": 6.4}
    of = {
        "short": {"prompt": 512, "output": 256, "rounds": 40, "forms": [short]},
        "long": {"prompt": 32000, "output": 768, "rounds": 5, "forms": [long]},
    }
    model = {"num_layers": 48, "num_experts": 128, "top_k": 8}
    text = _document(tmp_path, serving_encode={"model": model, "responses": of})
    assert "(48 layers, 128 experts, top 8): a response of" in text
    assert "512 + 256 tokens and one of 32000 + 768; median of 40 and 5 rounds" in text
    assert "| vllm | 512.3 | 0.90 | 0.7 | 0.20 | 6 |" in text


def test_stalls_faults_soak_and_fuzz(tmp_path: Path):
    rest = {"api_mb": 200.0, "engine_mb": 400.0, "free_blocks": 2048}
    text = _document(
        tmp_path,
        serving_stall={"context": 32000, "streams": 4, "repeats": 10, "rows": [
            {"case": "vllm", "response_bytes": 16_400_000, "response_ms": 210.0, "gaps": TIMES, "while_rows_leave": {**TIMES, "max_ms": 7.0}}]},
        serving_faults={"rows": [
            {"scenario": "kill", "outcomes": {"complete": 1, "HTTP 503 engine_dead": 9}, "exit_code": 1, "seconds_until_exit": 3.21},
            {"scenario": "slow", "outcomes": {"aborted": 4}, "beside_them": {"complete": 16}, "seconds_until_idle": 2.0,
             "memory_growth_mb": {"api": 1.2, "engine": -0.5}},
            {"scenario": "disk", "not_measured": "no mounts"}]},
        serving_soak={"minutes": 30.0, "workers": 24, "requests": {"whole": 5, "left": 7}, "failed": {"x": 2},
                      "at_rest_before": rest, "at_rest_after": {**rest, "free_blocks": 2047}, "growth_mb_per_hour": {"api": 1.0, "engine": -2.0}},
        serving_fuzz={"crashes": 1, "document": [{"operation": "GET /x", "cases": 10, "5xx": 1, "hung": 2, "not_as_documented": ["a"]}],
                      "bodies": [{"kind": "size", "cases": 3, "answers": {"413": 3}, "5xx": 0, "hung": 0}]},
    )  # fmt: skip
    assert "| vllm | 16.40 | 210 | 1.2 | 12.0 | 7.0 |" in text
    assert (
        "| kill | 9 HTTP 503 engine_dead, 1 complete | seconds until exit 3.2, exit code 1 |  |"
        in text
    )
    assert (
        "| slow | 4 aborted; beside them: 16 complete | seconds until idle 2.0 | API +1.2, engine -0.5 |"
        in text
    )
    assert "| disk | not measured: no mounts |  |  |" in text
    assert "30 minutes, 24 workers: 7 left, 5 whole; 2 failed." in text
    assert "| free KV blocks | 2048 | 2047 |  |" in text
    assert "| **all** | **13** | **1** | **2** | **1** |" in text
    assert "Crashes: 1." in text
