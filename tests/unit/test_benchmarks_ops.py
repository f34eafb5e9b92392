"""The parts of the layer benchmark that count, choose and report; nothing here is timed."""

import argparse
import json
import sys
import weakref
from collections.abc import Callable, Sequence
from math import inf, nan
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "ops"))

import moe_layer
import routing as routing_benchmark
from moe_bench.budget import Budget
from moe_bench.candidates import nearest, tile_candidates
from moe_bench.comparison import Case, Options, compare, run_once
from moe_bench.data import (
    LayerInput,
    LayerWeights,
    expected_output,
    layer_inputs,
    layer_weights,
    relative_l2,
    work_of_inputs,
)
from moe_bench.floors import floor_of, work_of
from moe_bench.hardware import recorded_options
from moe_bench.peers.contract import Configuration, LayerCall, PeerError
from moe_bench.peers.ours import Ours
from moe_bench.peers.routers import Router, RouterInput, load_all
from moe_bench.peers.sites import Site, import_despite_missing
from moe_bench.peers.torch_grouped import TorchGrouped
from moe_bench.rows import JsonLines, distribution_of, figures_of, ratio_of_rounds
from moe_bench.shapes import SHAPES, TOKENS, LayerShape
from moe_bench.summary import as_json, merge, tables

from routing_replay.kernels import RoutingMethod, RoutingMethodType, route

TINY = LayerShape(
    name="tiny",
    hidden_size=16,
    intermediate_size=8,
    num_local_experts=8,
    routing=RoutingMethod(type=RoutingMethodType.RenormalizeNaive, num_experts=8, top_k=2),
    copies=3,
)
TINY_PARTIAL = LayerShape(
    name="tiny_partial",
    hidden_size=16,
    intermediate_size=8,
    num_local_experts=4,
    routing=RoutingMethod(
        type=RoutingMethodType.DeepSeekV3, num_experts=16, top_k=2, n_group=4, topk_group=2, routed_scaling_factor=2.5
    ),
    copies=2,
)  # fmt: skip


def full_work(name: str, tokens: int, touched: float):
    shape = SHAPES[name]
    pairs = tokens * shape.routing.top_k
    return work_of(
        shape,
        num_tokens=tokens,
        touched_experts=touched,
        local_pairs=pairs,
        rows_read=tokens,
        weight_bytes=2,
        activation_bytes=2,
    )


# Computed by hand: 8 experts * 3 * 2048 * 768 weights * 2 bytes + 2 * 2048 * 2 bytes, over 3.106 TB/s; and so on.
@pytest.mark.parametrize(
    ("name", "tokens", "touched", "us", "bound"),
    [
        ("qwen3_30b_a3b", 1, 8, 24.31, "memory"),
        ("qwen3_30b_a3b", 1024, 128, 391.61, "memory"),
        ("qwen3_30b_a3b", 16384, 128, 1581.78, "compute"),
        ("olmoe", 4096, 64, 527.26, "compute"),
        ("mixtral_tp2", 1, 2, 113.44, "memory"),
        ("mixtral_tp2", 1024, 8, 461.35, "compute"),
        ("deepseek_v3_tp8", 4096, 256, 945.27, "memory"),
    ],
)
def test_floor_equals_the_hand_computed_one(
    name: str, tokens: int, touched: int, us: float, bound: str
):
    floor = floor_of(full_work(name, tokens, touched))
    assert floor.us == pytest.approx(us, abs=0.006)
    assert floor.bound == bound


def test_work_counts_bytes_of_the_real_dtypes():
    bf16 = full_work("olmoe", 8, 42)
    assert bf16.num_bytes == 42 * 3 * 2048 * 1024 * 2 + 2 * 8 * 2048 * 2
    assert bf16.num_flops == 6 * 8 * 8 * 2048 * 1024
    float32 = work_of(
        SHAPES["olmoe"],
        num_tokens=8,
        touched_experts=42,
        local_pairs=64,
        rows_read=8,
        weight_bytes=4,
        activation_bytes=4,
    )
    assert float32.num_bytes == 2 * bf16.num_bytes


def test_work_counts_only_what_is_on_this_rank():
    ids = torch.tensor([[0, 3], [3, 9], [12, 15]])
    given = LayerInput(
        x=torch.zeros(3, 16).bfloat16(),
        logits=torch.zeros(3, 16),
        bias=None,
        topk_ids=ids,
        topk_weights=torch.ones(3, 2),
    )
    work = work_of_inputs(TINY_PARTIAL, [given])
    assert work.touched_experts == 2  # 0 and 3
    assert work.num_flops == 2 * 3 * (3 * 16 * 8)  # three pairs
    assert work.num_bytes == 2 * (3 * 16 * 8) * 2 + (2 + 3) * 16 * 2  # two rows read, three written


def test_shapes_go_through_fewer_layers_where_one_is_large():
    assert [SHAPES["qwen3_30b_a3b"].layers(tokens) for tokens in (1, 1024, 2048)] == [8, 8, 2]
    assert SHAPES["mixtral_tp2"].layers(1) == 4
    assert len(TOKENS) == 15


def test_distribution_gives_median_and_percentiles():
    distribution = distribution_of([float(value) for value in range(11)])
    assert (distribution.us, distribution.p20, distribution.p80) == (5, 2, 8)
    assert distribution.samples == 11
    skewed = distribution_of([1.0, 1.0, 1.0, 100.0])
    assert (skewed.us, skewed.p20) == (1.0, 1.0)
    with pytest.raises(ValueError, match="at least 2"):
        distribution_of([1.0])


def test_figures_relate_a_time_to_the_floor():
    figures = figures_of(48.6, full_work("qwen3_30b_a3b", 1, 8))
    assert figures["share_of_floor"] == pytest.approx(0.5, abs=0.001)
    assert figures["tb_per_s"] == pytest.approx(1.5537, abs=0.001)
    assert figures["bound"] == "memory"


def test_ratio_is_taken_round_by_round():
    # Both slow down together in the second round: the ratio does not see it.
    ratio = ratio_of_rounds([[10, 10, 11], [20, 20, 22]], [[10, 10, 10], [20, 20, 20]])
    assert ratio["ratio"] == 1.0
    assert ratio_of_rounds([[11, 11], [22, 22]], [[10, 10], [20, 20]])["ratio"] == 1.1
    with pytest.raises(ValueError, match="zip"):
        ratio_of_rounds([[1, 1]], [[1, 1], [2, 2]])


def test_budget_stops_before_a_case_that_does_not_fit():
    now = [0.0]
    budget = Budget(100, clock=lambda: now[0])
    assert budget.allows_case()
    now[0] = 40
    budget.finished_case(40)
    assert budget.allows_case()
    now[0] = 70
    budget.finished_case(30)
    assert budget.left == 30
    assert not budget.allows_case()  # the longest took 40
    assert Budget(0, clock=lambda: 0.0).allows_case() is False


def test_candidates_follow_the_rows_of_an_expert():
    shape = SHAPES["qwen3_30b_a3b"]
    first = {tokens: tile_candidates(shape, tokens)[0]["BLOCK_SIZE_M"] for tokens in (1, 256, 257, 16384)}  # fmt: skip
    assert first == {1: 16, 256: 16, 257: 32, 16384: 64}
    assert all(len(tile_candidates(shape, tokens)) == 4 for tokens in TOKENS)


def test_nearest_entry_is_a_copy():
    table = {1: {"BLOCK_SIZE_M": 16}, 64: {"BLOCK_SIZE_M": 64}}
    tile = nearest(table, 40)
    assert tile == {"BLOCK_SIZE_M": 64}
    tile.clear()
    assert table[64] == {"BLOCK_SIZE_M": 64}


def test_expected_output_equals_a_loop_over_tokens():
    weights = layer_weights(TINY_PARTIAL, 0, "cpu")
    (given,) = layer_inputs(TINY_PARTIAL, 5, 1, seed=1, zipf=0.0, device="cpu")
    given.topk_ids[0, 0] = 3  # at least one pair is here
    output = expected_output(given, weights)
    for token in range(5):
        row = torch.zeros(16)
        for expert, scale in zip(given.topk_ids[token], given.topk_weights[token], strict=True):
            if expert < TINY_PARTIAL.num_local_experts:
                gate, up = (weights.gemm1[expert].float() @ given.x[token].float()).chunk(2)
                hidden = torch.nn.functional.silu(gate) * up
                row += scale * (weights.gemm2[expert].float() @ hidden)
        torch.testing.assert_close(output[token], row)
    assert output.abs().max() > 0


def test_zipf_load_touches_fewer_experts_and_layers_differ():
    even = layer_inputs(SHAPES["qwen3_30b_a3b"], 32, 2, seed=3, zipf=0.0, device="cpu")
    skewed = layer_inputs(SHAPES["qwen3_30b_a3b"], 32, 2, seed=3, zipf=1.0, device="cpu")
    assert even[0].topk_ids.unique().numel() > 1.5 * skewed[0].topk_ids.unique().numel()
    assert not torch.equal(even[0].topk_ids, even[1].topk_ids)


def test_interleaved_rows_alternate_gate_and_up():
    weights = layer_weights(TINY, 0, "cpu")
    rows = weights.interleaved_gemm1()
    assert torch.equal(rows[:, 0::2], weights.gemm1[:, :8])
    assert torch.equal(rows[:, 1::2], weights.gemm1[:, 8:])
    assert weights.interleaved_gemm1() is rows


def test_relative_l2_sees_one_poisoned_element():
    expected = torch.randn(4, 4)
    assert relative_l2(expected.bfloat16(), expected) < 1e-2
    poisoned = expected.clone()
    poisoned[2, 3] = nan
    assert not relative_l2(poisoned, expected) < 1e-2


class Eager:
    """Runs calls again instead of replaying a graph, and reports canned times."""

    def __init__(self, calls: Sequence[Callable[[], Tensor]], time: float) -> None:
        self._calls = calls
        self._time = time
        self.outputs = [call() for call in calls]

    def replay(self) -> None:
        for output, call in zip(self.outputs, self._calls, strict=True):
            output.copy_(call())

    def times(self, count: int) -> list[float]:
        return [self._time] * count


class EagerTimer:
    def __init__(self) -> None:
        self.captured = 0

    def capture(self, calls: Sequence[Callable[[], Tensor]]) -> Eager:
        self.captured += 1
        return Eager(calls, 100.0 * self.captured)


class GraphLike(Eager):
    """Holds on to calls as little as a CUDA graph does: what they own must be kept alive by others until it is timed."""

    def __init__(self, calls: Sequence[Callable[[], Tensor]]) -> None:
        super().__init__(calls, 100.0)
        self._alive = [weakref.ref(call) for call in calls]
        self._calls = ()

    def replay(self) -> None:
        assert all(call() is not None for call in self._alive)
        for output, call in zip(self.outputs, self._alive, strict=True):
            output.copy_(call()())

    def times(self, count: int) -> list[float]:
        assert all(call() is not None for call in self._alive), "timed after its tensors were freed"
        return [100.0] * count


class GraphLikeTimer:
    def capture(self, calls: Sequence[Callable[[], Tensor]]) -> GraphLike:
        return GraphLike(calls)


class Faulty:
    """An entrant that is right until it is told otherwise."""

    name = "faulty"

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def refusal(self, shape: LayerShape, num_tokens: int) -> str | None:
        return "not now" if self.fault == "refuses" else None

    def configurations(self, shape: LayerShape, num_tokens: int) -> list[Configuration]:
        labels = ("slow", "fast") if self.fault == "tunes" else ("one",)
        return [Configuration(label=label) for label in labels]

    def layer(
        self,
        shape: LayerShape,
        given: LayerInput,
        weights: LayerWeights,
        configuration: Configuration,
    ) -> LayerCall:
        if self.fault == "raises" or (self.fault == "tunes" and configuration.label == "slow"):
            raise RuntimeError("out of shared\nmemory")
        recorded = torch.full(given.topk_ids.shape, -1, dtype=torch.int16)

        def run() -> Tensor:
            ids = given.topk_ids.flip(1) if self.fault == "swaps ids" else given.topk_ids
            recorded.copy_(ids)
            output = expected_output(given, weights)
            if self.fault == "skips a row":
                output[-1] = nan
            if self.fault == "is off":
                output *= 1.02
            return output

        return LayerCall(run=run, recorded=recorded)


def test_tensors_of_an_entrant_live_until_it_is_timed():
    weights = [layer_weights(TINY_PARTIAL, index, "cpu") for index in range(TINY_PARTIAL.copies)]
    case = Case(shape=TINY_PARTIAL, num_tokens=5, weights=weights)
    peers = [Ours(is_recording=is_recording, backend="reference") for is_recording in (False, True)]
    rows: list[str] = []
    options = Options(device="cpu", rounds=2, runs=3)
    compare(case, peers, GraphLikeTimer(), options, lambda kind, **_: rows.append(kind))
    assert rows.count("layer") == 2


def compared(shape: LayerShape, peers: list[object], **options: object) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    weights = [layer_weights(shape, index, "cpu") for index in range(shape.copies)]
    case = Case(shape=shape, num_tokens=5, weights=weights)
    compare(
        case,
        peers,
        EagerTimer(),
        Options(device="cpu", rounds=2, runs=3, **options),
        lambda kind, **columns: rows.append({"kind": kind, **columns}),
    )
    return rows


@pytest.mark.parametrize("shape", [TINY, TINY_PARTIAL], ids=lambda shape: shape.name)
def test_comparison_reports_every_entrant_and_what_recording_costs(shape: LayerShape):
    peers = [
        Ours(is_recording=False, backend="reference"),
        Ours(is_recording=True, backend="reference"),
        TorchGrouped(),
    ]
    rows = compared(shape, peers)
    measured = [str(row["peer"]) for row in rows if row["kind"] == "layer"]
    everyone = [peer.name for peer in peers]
    assert measured == (everyone if shape.has_all_experts else everyone[:2])
    ours = next(row for row in rows if row["kind"] == "layer" and row["peer"] == "ours")
    assert ours["layers"] == shape.copies
    assert ours["us"] == pytest.approx(100.0 / shape.copies, abs=1e-3)
    assert ours["samples"] == 6 == len(ours["times_us"])
    assert 0 < ours["relative_l2"] < 1e-2
    assert rows[-1]["kind"] == "ratio"
    assert rows[-1]["ratio"] == 2.0  # the second graph was recorded second
    others = {row["kind"] for row in rows if row["peer"] == "torch_grouped_mm"}
    assert others == ({"layer"} if shape.has_all_experts else {"refused"})
    json.dumps(rows)


@pytest.mark.parametrize(
    ("fault", "kind", "reason"),
    [
        ("refuses", "refused", "not now"),
        ("raises", "failed", "RuntimeError: out of shared memory"),
        ("skips a row", "wrong", "relative L2 nan"),
        ("is off", "wrong", "relative L2 0.02"),
        ("swaps ids", "wrong", "relative L2 inf"),
        ("none", "layer", None),
    ],
)
def test_comparison_gives_no_number_for_a_wrong_entrant(fault: str, kind: str, reason: str | None):
    rows = compared(TINY, [Faulty(fault)])
    assert [row["kind"] for row in rows] == [kind]
    assert "us" in rows[0] if reason is None else rows[0]["reason"].startswith(reason)


def test_comparison_takes_the_configuration_that_runs():
    rows = compared(TINY, [Faulty("tunes")])
    assert [(row["kind"], row["configuration"]) for row in rows] == [("failed", "slow"), ("layer", "fast")]  # fmt: skip


def test_building_kernels_reports_what_failed_and_goes_on():
    case = Case(shape=TINY, num_tokens=2, weights=[layer_weights(TINY, 0, "cpu")])
    assert run_once(case, Faulty("none"), Options(device="cpu")) == []
    assert run_once(case, Faulty("refuses"), Options(device="cpu")) == []
    (problem,) = run_once(case, Faulty("tunes"), Options(device="cpu"))
    assert problem.startswith("faulty slow: RuntimeError")


def test_missing_pack_is_named_with_what_to_do(tmp_path: Path):
    for site in (Site(None), Site(tmp_path)):
        assert not site.has("sglang")
        with pytest.raises(PeerError, match=r"pack 'sglang' is not in .*build/peers/sglang"):
            site.root("sglang")


def test_peer_that_does_not_load_is_a_row(tmp_path: Path):
    names = ["ours", "sglang", "vllm", "triton_kernels", "sonic"]
    with JsonLines(tmp_path / "rows.jsonl") as output:
        peers = moe_layer.load_peers(names, Site(None), output)
    assert [peer.name for peer in peers] == ["ours"]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["peer"]) for row in rows] == [
        ("absent", name) for name in ("sglang", "vllm", "triton_kernels", "sonic")
    ]
    assert all("is not in None" in row["reason"] for row in rows)


def test_stand_ins_replace_missing_packages_but_not_the_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    package = tmp_path / "some_engine"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import no_such_server\nfrom no_such_tracer.api import traced\n"
        "class Handler(no_such_server.Handler): pass\n"
        "@traced\ndef kernel(): return 42\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in ("some_engine", "no_such_server", "no_such_tracer", "no_such_tracer.api"):
        monkeypatch.setitem(sys.modules, name, None)  # so that what is imported here is undone
        del sys.modules[name]

    def load() -> int:
        import some_engine

        return some_engine.kernel()

    assert import_despite_missing(load, root="some_engine") == (42, ["no_such_server", "no_such_tracer"])  # fmt: skip
    with pytest.raises(ModuleNotFoundError):
        import_despite_missing(lambda: __import__("no_such_peer.ops"), root="no_such_peer")


def test_rows_of_a_cut_run_are_kept_and_merged(tmp_path: Path):
    path = tmp_path / "qwen3.jsonl"
    rows = compared(TINY, [Ours(is_recording=False, backend="reference"), Faulty("refuses")])
    with JsonLines(path) as output:
        output.write("machine", commit="abc", device="some GPU")
        for row in rows:
            output.write(row.pop("kind"), **row)
        # The file is complete before it is closed: a killed process loses nothing.
        merged = merge([path])
    assert [row["run"] for row in merged["layers"]] == ["qwen3"]
    assert merged["not_measured"][0]["what"] == "refused"
    assert json.loads(as_json(merged)) == merged
    assert max(map(len, as_json(merged).splitlines())) < 1000
    text = tables(merged)
    assert "| 5 |" in text
    assert "refused: faulty tiny 5: not now" in text


def test_merge_refuses_other_files(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"kind": "layer"}\n')
    with pytest.raises(ValueError, match="which machine"):
        merge([path])
    path.write_text('{"kind": "machine"}\n{"kind": "guess"}\n')
    with pytest.raises(ValueError, match="kind 'guess'; accepted are layer"):
        merge([path])


def test_printed_lines_say_what_a_row_says():
    where = {"shape": "olmoe", "tokens": 8, "peer": "ours"}
    line = moe_layer.line_of
    assert line("layer", {**where, "us": 170.5, "share_of_floor": 0.9361}) == "olmoe T=8 ours: 170.5 us, 94 % of the floor"  # fmt: skip
    assert line("ratio", {**where, "ratio": 1.002, "over": "ours"}) == "olmoe T=8 ours: 1.002 of ours"  # fmt: skip
    assert line("skipped", {"shape": "olmoe", "tokens": 8, "reason": "late"}) == "olmoe T=8 : skipped: late"  # fmt: skip


def test_command_line_refuses_unknown_names(capsys: pytest.CaptureFixture[str]):
    base = ["measure", "--out", "x.jsonl", "--commit", "abc"]
    arguments = moe_layer.arguments_of([*base, "--shapes", "olmoe", "--tokens", "1,8"])
    assert (arguments.shapes, arguments.tokens) == (["olmoe"], [1, 8])
    with pytest.raises(SystemExit):
        moe_layer.arguments_of([*base, "--peers", "ours,nobody"])
    assert "nobody: not known; accepted are ours" in capsys.readouterr().err


def router_that(fault: str) -> Router:
    """A router for the tiny partial layer, right until it is told otherwise."""

    def run(given: RouterInput) -> tuple[Tensor, Tensor]:
        if fault == "raises":
            raise RuntimeError("no kernel image")
        weights, ids = route(
            given.logits,
            TINY_PARTIAL.routing,
            routing_bias=given.bias,
            routing_replay_out=given.recorded,
        )
        if fault == "orders as it likes":
            return weights.flip(1), ids.flip(1)
        if fault == "scales":
            weights = weights * 1.01
        if fault == "records late":
            given.recorded[-1] = -1
        return weights, ids

    is_recording = fault in ("none", "records late")
    return Router(name=fault, makes_plan=False, run=run, is_recording=is_recording)


@pytest.mark.parametrize(
    ("fault", "kind", "reason"),
    [
        ("none", "routing", ""),
        ("orders as it likes", "routing", ""),
        ("scales", "wrong", "weights by expert are off by 0.0"),
        ("records late", "wrong", "recorded ids are not those"),
        ("raises", "failed", "RuntimeError: no kernel image"),
    ],
)
def test_router_gets_a_number_only_if_it_is_right(
    tmp_path: Path, fault: str, kind: str, reason: str
):
    routers = [router_that(fault)]
    with JsonLines(tmp_path / "rows.jsonl") as output:
        routing_benchmark.measure(TINY_PARTIAL, 7, routers, EagerTimer(), output, device="cpu")
    (line,) = (tmp_path / "rows.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["kind"], row["tokens"], row["makes_plan"]) == (kind, 7, False)
    assert row.get("reason", "").startswith(reason)
    assert ("us" in row) == (kind == "routing")
    if kind == "routing":
        assert row["us"] == 100.0 / routing_benchmark.CALLS


def test_routers_that_do_not_load_are_named():
    absent: list[tuple[str, str]] = []
    names = ["torch", "sglang", "vllm", "flashinfer"]
    found = load_all(names, TINY, 16, Site(None), lambda *reason: absent.append(reason))
    assert [router.name for router in found] == ["torch"]
    assert [name for name, _ in absent] == ["sglang", "vllm", "flashinfer"]
    assert all("is not in None" in reason for _, reason in absent)


def test_recorded_options_name_no_path_and_are_json(tmp_path: Path):
    given = argparse.Namespace(site=tmp_path, out=tmp_path / "x", commit="c", tokens=[1, 8], zipf=0.0, budget_seconds=inf, shard=None)  # fmt: skip
    assert recorded_options(given) == {"tokens": [1, 8], "zipf": 0.0}
