"""What the tuner runs, on a CPU: copies of a layer, the correctness gate, and no replay buffer anywhere."""

import inspect
from dataclasses import replace

import pytest
import torch

from routing_replay.errors import ConfigError
from routing_replay.kernels.experts import tuning_workload
from routing_replay.kernels.experts.config import ExpertsConfig, GemmTile
from routing_replay.kernels.experts.tables import LayerShape
from routing_replay.kernels.experts.tuning import tune_layer
from routing_replay.kernels.experts.tuning_workload import (
    CheckedRuns,
    GraphWorkload,
    LayerCopies,
    Step,
    cuda_device,
    num_copies,
    run_step,
)

QWEN = LayerShape(
    hidden_size=2048, intermediate_size=768, num_experts=128, num_local_experts=128, top_k=8
)
SMALL = LayerShape(
    hidden_size=32, intermediate_size=16, num_experts=8, num_local_experts=8, top_k=2
)
TILE = GemmTile(rows=32, depth=16, stages=2, warps=4)
CONFIG = ExpertsConfig(engine="portable", tile_tokens=16, gemm1=TILE, gemm2=TILE)


def test_copies_leave_no_weights_in_the_cache():
    l2 = 50 * 2**20
    expert = 3 * 2048 * 768 * 2
    assert num_copies(QWEN, 1, l2) == 3
    assert 3 * 8 * expert > 4 * l2 >= 2 * 8 * expert
    assert num_copies(QWEN, 4096, l2) == 2
    half = replace(QWEN, num_local_experts=64)
    assert num_copies(half, 1, l2) == 6  # half of the pairs are another rank's
    with pytest.raises(ConfigError, match=r"num_tokens=1.*accepted are 256"):
        num_copies(SMALL, 1, l2)


def _steps(num_tokens: int = 5) -> list[Step]:
    copies = LayerCopies(
        SMALL, fewest_tokens=num_tokens, device=torch.device("cpu"), l2_bytes=4096, seed=3
    )
    return copies.steps(num_tokens)


def _right(layer: LayerShape, step: Step, config: ExpertsConfig | None) -> None:
    del config
    run_step(layer, step, None)


def test_layer_copies_have_weights_and_routing_of_their_own():
    steps, again = _steps(), _steps()
    assert len(steps) == num_copies(SMALL, 5, 4096) >= 2
    for name in ("routing_logits", "hidden_states"):
        tensors = [getattr(step, name) for step in steps]
        assert not any(torch.equal(tensors[0], other) for other in tensors[1:])
        assert all(torch.equal(a, getattr(b, name)) for a, b in zip(tensors, again, strict=True))
    weights = [step.weights.gemm1_weights for step in steps]
    assert len({tensor.data_ptr() for tensor in weights}) == len(steps)
    assert weights[0].shape == (8, 32, 32)


def test_checked_runs_accept_the_right_result_only():
    broken: list[int] = []

    def run(layer: LayerShape, step: Step, config: ExpertsConfig | None) -> None:
        _right(layer, step, config)
        if config is not None and step is steps[-1] and broken:
            step.output[broken[0]] *= 1.05

    steps = _steps()
    runs = CheckedRuns(SMALL, steps, run)
    runs.poison()
    assert runs.fault() is not None  # nothing was computed
    runs.sweep(CONFIG)
    assert runs.fault() is None
    broken.append(2)
    runs.poison()
    runs.sweep(CONFIG)
    assert f"copy {len(steps) - 1} has a relative error" in (runs.fault() or "")


def test_checked_runs_see_a_row_that_was_not_written():
    def run(layer: LayerShape, step: Step, config: ExpertsConfig | None) -> None:
        kept = step.output[1].clone()
        _right(layer, step, config)
        if config is not None:
            step.output[1] = kept

    runs = CheckedRuns(SMALL, _steps(), run)
    runs.sweep(CONFIG)
    assert runs.fault() is None  # what the reference left there
    runs.poison()
    runs.sweep(CONFIG)
    assert "nan" in (runs.fault() or "")


def test_tuner_knows_no_replay_buffer():
    for function in (tune_layer, run_step, CheckedRuns, LayerCopies):
        assert not any("replay" in name for name in inspect.signature(function).parameters)
    assert "routing_replay_out" not in inspect.getsource(tuning_workload)
    assert "routing_replay_in" not in inspect.getsource(tuning_workload)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on a GPU")
def test_graph_workload_times_what_is_right_and_refuses_what_is_wrong():
    device, l2_bytes = cuda_device(0)
    layer = LayerShape(
        hidden_size=256, intermediate_size=256, num_experts=16, num_local_experts=16, top_k=4
    )
    cuda = torch.device("cuda", 0)
    copies = LayerCopies(layer, fewest_tokens=64, device=cuda, l2_bytes=l2_bytes, seed=0)

    def run(layer: LayerShape, step: Step, config: ExpertsConfig | None) -> None:
        run_step(layer, step, config)
        if config is not None and config.tile_tokens == 32:
            step.output[-1].zero_()

    workload = GraphWorkload(CheckedRuns(layer, copies.steps(64), run))
    assert workload.refusal(CONFIG) is None
    samples = workload.sample_us(CONFIG, 5)
    assert len(samples) == 5
    assert all(1.0 < sample < 1e4 for sample in samples)
    assert "relative error" in (workload.refusal(replace(CONFIG, tile_tokens=32)) or "")
    workload.release(CONFIG)
    with pytest.raises(KeyError):
        workload.sample_us(CONFIG, 1)
    (tuned,) = tune_layer(
        layer,
        [64],
        device,
        lambda num_tokens: GraphWorkload(CheckedRuns(layer, copies.steps(num_tokens))),
        budget_seconds=30.0,
    )
    assert tuned.microseconds <= tuned.rule_microseconds
    assert tuned.num_timed > 1
