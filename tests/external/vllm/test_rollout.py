"""Rollouts of a real vLLM: their rows against Transformers and our engine, and every command on their folders."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from _support.teacher import MARGIN, Teacher, load_teacher, teach
from external.vllm.conftest import Done, Measured
from external.vllm.models import VllmModel, prompt_lines
from routing_replay.engine import LLM, SamplingParams
from routing_replay.trace import RolloutReader, RolloutSample

SAMPLING = ("--n", 2, "--max-tokens", 24, "--ignore-eos")
OFFLINE = {"enforce_eager": True, "max_num_batched_tokens": 64, "max_num_seqs": 8, "block_size": 32}

Run = Callable[..., Done]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rolled:
    """A rollout that a real vLLM made."""

    way: str
    model: VllmModel
    folder: Path
    done: Done


@pytest.fixture(scope="session", params=["offline", "server"])
def rolled(
    request: pytest.FixtureRequest,
    model: VllmModel,
    prompts: Path,
    run: Run,
    tmp_path_factory: pytest.TempPathFactory,
) -> Rolled:
    folder = tmp_path_factory.mktemp("rollout") / "out"
    words: tuple[object, ...] = ("rollout", model.folder, prompts, "-o", folder, "--engine", "vllm")
    if request.param == "server":
        words = (*words, "--url", request.getfixturevalue("server"))
    else:
        words = (*words, "--dtype", "float32", "--max-model-len", 256, "--engine-args", json.dumps(OFFLINE))  # fmt: skip
    done = run(*words, *SAMPLING, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    return Rolled(way=request.param, model=model, folder=folder, done=done)


def _samples(folder: Path) -> list[RolloutSample]:
    with RolloutReader(folder) as reader:
        return list(reader)


def _as_output(sample: RolloutSample) -> SimpleNamespace:
    completion = SimpleNamespace(token_ids=sample.token_ids)
    return SimpleNamespace(prompt_token_ids=sample.prompt_token_ids, outputs=(completion,))


def _differs(ids: NDArray[np.integer], other: NDArray[np.integer]) -> NDArray[np.bool_]:
    """(row, layer) pairs with other experts, as sets: vLLM's columns are in no order."""
    assert ids.shape == other.shape
    return (np.sort(ids.astype(np.int64), -1) != np.sort(other.astype(np.int64), -1)).any(-1)


def _check_sensitivity(sample: RolloutSample, teacher: Teacher) -> None:
    """The comparison sees one changed id, and rows that are shifted by one."""
    ids = sample.trace.ids.copy()
    row, slot = np.argwhere(teacher.is_clear)[-1]
    ids[row, slot, 0] = np.setdiff1d(np.arange(sample.trace.num_experts), ids[row, slot])[0]
    assert (_differs(ids, teacher.expert_ids) & teacher.is_clear).sum() == 1
    if len(ids) > 30:
        shifted = _differs(sample.trace.ids[1:], teacher.expert_ids[:-1])
        assert shifted.mean() > 0.3


def test_rows_equal_transformers_and_our_engine(rolled: Rolled, measured: Measured):
    samples = _samples(rolled.folder)
    assert len(samples) == 2 * len(prompt_lines())
    teacher_model = load_teacher(rolled.model.folder)
    llm = LLM(rolled.model.folder, dtype="float32", enable_return_routed_experts=True)
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    rows = pairs = clear = wrong = unclear_wrong = ours_wrong = 0
    worst = 0.0
    for sample in samples:
        assert sample.trace.num_rows == len(sample.all_token_ids) - 1
        teacher = teach(teacher_model, _as_output(sample))  # type: ignore[arg-type]
        differs = _differs(sample.trace.ids, teacher.expert_ids)
        (output,) = llm.generate([list(sample.all_token_ids)], params, use_tqdm=False)
        ours = output.outputs[0].routing.ids[: sample.trace.num_rows]
        rows += sample.trace.num_rows
        pairs += differs.size
        clear += int(teacher.is_clear.sum())
        wrong += int((differs & teacher.is_clear).sum())
        unclear_wrong += int((differs & ~teacher.is_clear).sum())
        ours_wrong += int((_differs(sample.trace.ids, ours) & teacher.is_clear).sum())
        worst = max(worst, float(np.abs(np.asarray(sample.logprobs) - teacher.logprobs).max()))
        _check_sensitivity(sample, teacher)
    assert (wrong, ours_wrong) == (0, 0)
    assert clear > 0.9 * pairs
    assert worst < 1e-3
    measured["rows"].append(
        {
            "model": rolled.model.name,
            "way": rolled.way,
            "dtype": "float32",
            "samples": len(samples),
            "rows": rows,
            "row_layer_pairs": pairs,
            "pairs_with_margin_above": {"margin": MARGIN, "pairs": clear},
            "mismatches_with_transformers": wrong,
            "mismatches_with_our_engine": ours_wrong,
            "mismatches_within_margin": unclear_wrong,
            "max_abs_dlogp": worst,
            "rollout_seconds": rolled.done.summary["seconds"],
        }
    )


def test_inspect_audit_and_export_take_the_folder(rolled: Rolled, run: Run, tmp_path: Path, measured: Measured):  # fmt: skip
    inspected = run("inspect", rolled.folder, "--json")
    assert (inspected.returncode, inspected.summary["problems"]) == (0, {})
    facts = inspected.summary["facts"]
    assert isinstance(facts, dict)
    assert (facts["engine"], facts["engine_version"]) == ("vllm", "0.30.0")
    audited = run("audit", rolled.folder, "-m", rolled.model.folder, "--json")
    assert audited.returncode == 0, audited.stderr[-2000:]
    assert (audited.summary["exact"], audited.summary["coverage"]) == (True, 1.0)
    exported = run("export", rolled.folder, "--to", "verl", "-o", tmp_path / "verl", "--json")
    assert exported.returncode == 0, exported.stderr[-2000:]
    assert exported.summary["traces"] == 2 * len(prompt_lines())
    for name, done in (("inspect", inspected), ("audit", audited), ("export", exported)):
        row = {"model": rolled.model.name, "way": rolled.way, "command": name}
        measured["commands"].append({**row, "seconds": done.seconds})


def test_compiled_graphs_are_refused_by_name(
    model: VllmModel, prompts: Path, run: Run, tmp_path: Path, measured: Measured
):
    words = ("rollout", model.folder, prompts, "-o", tmp_path / "out", "--engine", "vllm")
    arguments = json.dumps({**OFFLINE, "enforce_eager": False})
    done = run(*words, "--dtype", "float32", "--max-model-len", 256, "--engine-args", arguments)
    assert done.returncode == 1
    message = next(
        line for line in done.stderr.splitlines() if line.startswith("error: the canary")
    )
    assert "[all_zero]" in message
    assert "enforce_eager=True (--enforce-eager)" in message
    assert not (tmp_path / "out").exists()
    measured["refusals"].append(
        {
            "model": model.name,
            "what": "torch.compile, the default on the CPU",
            "finding": "all_zero",
        }
    )


def test_tensor_parallel_rows_are_the_same(model: VllmModel, prompts: Path, run: Run, tmp_path: Path, measured: Measured):  # fmt: skip
    """Two ranks: greedy tokens and rows are those of Transformers."""
    arguments = json.dumps({**OFFLINE, "tensor_parallel_size": 2})
    words = ("rollout", model.folder, prompts, "-o", tmp_path / "out", "--engine", "vllm")
    words = (*words, "--dtype", "float32", "--max-model-len", 256, "--engine-args", arguments)
    done = run(
        *words, "--temperature", 0, "--max-tokens", 8, "--json", env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    teacher_model = load_teacher(model.folder)
    rows = wrong = pairs = 0
    samples = _samples(tmp_path / "out")
    for sample in samples:
        teacher = teach(teacher_model, _as_output(sample))  # type: ignore[arg-type]
        differs = _differs(sample.trace.ids, teacher.expert_ids)
        rows += sample.trace.num_rows
        pairs += differs.size
        wrong += int((differs & teacher.is_clear).sum())
        _check_sensitivity(sample, teacher)
    assert wrong == 0
    measured["rows"].append(
        {
            "model": model.name,
            "way": "offline, tensor_parallel_size=2",
            "dtype": "float32",
            "samples": len(samples),
            "rows": rows,
            "row_layer_pairs": pairs,
            "mismatches_with_transformers": wrong,
            "rollout_seconds": done.summary["seconds"],
        }
    )
