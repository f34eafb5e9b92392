"""Faults that other libraries' fused MoE ops have had, looked for in these: docs/pitfalls.md names each with its test.

Checks of routing take the function that routes: here the registered op, and in a subprocess the interpreted Triton kernel.
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from routing_replay import kernels
from routing_replay.capture.device_cache import DeviceCache, RoutingSpec
from routing_replay.errors import ConfigError
from routing_replay.kernels import (
    RoutingMethod,
    RoutingMethodType,
    bf16_moe,
    bf16_routed_moe,
    fused_topk_deepseek,
    route,
)
from routing_replay.kernels.experts import combine_reference

Kind = RoutingMethodType
KERNELS = Path(kernels.__file__).parent
Route = Callable[[Tensor, RoutingMethod, Tensor | None, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]  # fmt: skip


def _by_op(logits: Tensor, method: RoutingMethod, bias: Tensor | None, forced: Tensor | None, recorded: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    return route(logits, method, routing_bias=bias, routing_replay_in=forced, routing_replay_out=recorded)  # fmt: skip


def by_kernel(logits: Tensor, method: RoutingMethod, bias: Tensor | None, forced: Tensor | None, recorded: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Route with the Triton kernel, into memory that holds NaN and ids of no expert."""
    from routing_replay.kernels.routing._triton import launch_route

    size = (logits.shape[0], method.num_columns)
    weights = torch.full(size, float("nan"))
    ids = torch.full(size, 0x7FFFFFFF, dtype=torch.int32)
    launch_route(logits, method, weights, ids, routing_bias=bias, routing_replay_in=forced, routing_replay_out=recorded)  # fmt: skip
    return weights, ids


def _method(kind: Kind, experts: int, top_k: int, **more: object) -> RoutingMethod:
    top_k = 1 if kind is Kind.Llama4 else top_k
    return RoutingMethod(type=kind, num_experts=experts, top_k=top_k, **more)  # pyright: ignore[reportArgumentType]


def _bias(method: RoutingMethod, value: float = 0.0) -> Tensor | None:
    return torch.full((method.num_experts,), value) if method.takes_bias else None


def _all_methods(experts: int = 24, top_k: int = 3) -> list[RoutingMethod]:
    grouped = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    plain = [_method(kind, experts, top_k) for kind in Kind]
    return [*plain, _method(Kind.DeepSeekV3, experts, top_k, **grouped),
            _method(Kind.DeepSeekV3, experts, top_k, num_fused_shared_experts=2)]  # fmt: skip


def _guarded(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A replay buffer, and the memory it lies in: as much again before and after it."""
    memory = torch.full((3 * rows, columns), -7, dtype=torch.int16)
    return memory[rows : 2 * rows], memory


def check_every_row_is_written_and_no_other(run: Route, tokens: tuple[int, ...]) -> None:
    for method in _all_methods():
        for count in tokens:
            logits = torch.randn(count, method.num_experts)
            buffer, memory = _guarded(count + 3, method.top_k)
            _, ids = run(logits, method, _bias(method), None, buffer)
            assert buffer[:count].tolist() == ids[:, : method.top_k].tolist()
            is_row = torch.zeros(len(memory), dtype=torch.bool)
            is_row[count + 3 : 2 * count + 3] = True
            assert (memory[~is_row] == -7).all(), "a row that is no token's was written"


def check_padding_never_wins(run: Route) -> None:
    """Slots beyond E, of E that is no power of two, stand below every logit, minus infinity too."""
    for experts in (3, 24, 36):
        for method in (
            _all_methods(experts) if experts % 4 == 0 else [_method(k, experts, 3) for k in Kind]
        ):
            for low in (-3.0, -1e4, -3e38, -math.inf):
                logits = torch.full((2, experts), low)
                logits[1, -1] = -2.0
                _, ids = run(logits, method, _bias(method, -50.0), None, None)
                routed = ids[:, : method.top_k]
                assert ((routed >= 0) & (routed < experts)).all()
                assert all(len(set(row)) == method.top_k for row in routed.tolist())
                if low > -math.inf or method.type not in (Kind.Default, Kind.RenormalizeNaive):
                    assert ids[1, 0] == experts - 1  # the largest, at the end


def check_columns_are_in_rank_order(run: Route) -> None:
    """Position by position: a reversed or shuffled row has the same set of ids and must not pass."""
    for method in _all_methods():
        order = torch.stack([torch.randperm(method.num_experts) for _ in range(3)])
        logits = torch.empty(3, method.num_experts)
        logits.scatter_(1, order, torch.linspace(4, -4, method.num_experts).expand(3, -1).contiguous())  # fmt: skip
        _, ids = run(logits, method, _bias(method), None, None)
        if method.n_group == 1:
            assert ids[:, : method.top_k].tolist() == order[:, : method.top_k].tolist()
        else:
            routed = logits.gather(1, ids[:, : method.top_k].long())
            assert (routed.diff(dim=1) < 0).all()


def check_dtype_of_logits_is_read(run: Route) -> None:
    """bfloat16 logits count as the float32 numbers that they are, and float32 ones are not rounded to bfloat16."""
    for method in _all_methods():
        logits = torch.randn(3, method.num_experts).bfloat16()
        weights, ids = run(logits, method, _bias(method), None, None)
        expected_weights, expected = run(logits.float(), method, _bias(method), None, None)
        assert torch.equal(ids, expected)
        assert torch.equal(weights, expected_weights)
        close = torch.full((1, method.num_experts), 0.5)
        close[0, -1] += 2**-12
        assert close.bfloat16()[0, -1] == 0.5
        _, ids = run(close, method, _bias(method), None, None)
        assert ids[0, 0] == method.num_experts - 1
        _, rounded = run(close.bfloat16(), method, _bias(method), None, None)
        assert rounded[0, 0] == 0


def check_bias_is_read_in_float32(run: Route) -> None:
    """With all groups allowed, grouped and ungrouped selection see the same keys, to the last bit of the bias."""
    bias = torch.full((24,), 0.5)
    bias[17] += 2**-12  # the same in bfloat16
    logits = torch.zeros(2, 24)
    chosen = [
        run(logits, _method(kind, 24, 3, **groups), bias, None, None)[1].tolist()
        for kind, groups in (
            (Kind.MiniMax2, {}),
            (Kind.DeepSeekV3, {}),
            (Kind.DeepSeekV3, {"n_group": 4, "topk_group": 4}),
        )
    ]
    assert chosen == [[[17, 0, 1]] * 2] * 3


def check_small_weights_survive_a_large_bias(run: Route) -> None:
    bias = torch.full((8,), 1e4)
    logits = torch.linspace(-9, -8, 8).expand(1, 8).contiguous()
    method = _method(Kind.MiniMax2, 8, 2)
    weights, ids = run(logits, method, bias, None, None)
    exact = logits.double().sigmoid()[0, ids[0].long()]
    torch.testing.assert_close(weights[0].double(), exact / exact.sum(), rtol=2e-6, atol=0)


def check_underflow_gives_no_nan(run: Route) -> None:
    for method in _all_methods():
        logits = torch.full((1, method.num_experts), -1e4)
        weights, _ = run(logits, method, _bias(method), None, None)
        assert weights.isfinite().all(), method


def check_ties_of_bfloat16_go_to_the_smaller_id(run: Route) -> None:
    method = _method(Kind.Renormalize, 256, 8)
    logits = (torch.randn(2, 256) * 0.1).bfloat16()
    values = logits.float().tolist()
    assert any(len(set(row)) < 256 for row in values)  # there are ties
    _, ids = run(logits, method, None, None, None)
    expected = [sorted(range(256), key=lambda e: (-row[e], e))[:8] for row in values]
    assert ids.tolist() == expected
    logits[:, 100:140] = logits.max() + 1  # among the best, all of one value
    _, ids = run(logits, method, None, None, None)
    assert ids.tolist() == [list(range(100, 108))] * 2


def check_ids_of_minus_one_among_forced_ones_weigh_nothing(run: Route) -> None:
    for kind in (Kind.Renormalize, Kind.RenormalizeNaive, Kind.DeepSeekV3, Kind.Default):
        method = _method(kind, 24, 3)
        logits = torch.randn(2, 24)
        forced = torch.tensor([[4, -1, 9], [9, 4, 4]], dtype=torch.int16)
        recorded = torch.full((2, 3), -7, dtype=torch.int16)
        weights, ids = run(logits, method, _bias(method), forced, recorded)
        assert ids.tolist() == recorded.tolist() == forced.tolist()
        assert weights[0, 1] == weights[1, 2] == 0
        assert (weights[0, [0, 2]] > 0).all()
        assert (weights[1, :2] > 0).all()


ROUTING_CHECKS = (
    check_padding_never_wins,
    check_columns_are_in_rank_order,
    check_dtype_of_logits_is_read,
    check_bias_is_read_in_float32,
    check_small_weights_survive_a_large_bias,
    check_underflow_gives_no_nan,
    check_ties_of_bfloat16_go_to_the_smaller_id,
    check_ids_of_minus_one_among_forced_ones_weigh_nothing,
)


@pytest.mark.parametrize("check", ROUTING_CHECKS)
@pytest.mark.usefixtures("poisoned_memory")
def test_reference_router(check: Callable[[Route], None]):
    check(_by_op)


@pytest.mark.usefixtures("poisoned_memory")
def test_every_method_records_at_every_size():
    check_every_row_is_written_and_no_other(_by_op, (0, 1, 4, 5, 16, 17, 257))


def _swapped(run: Route) -> Route:
    """A router that returns two columns in the wrong order."""

    def wrong(*arguments: object) -> tuple[Tensor, Tensor]:
        weights, ids = run(*arguments)  # pyright: ignore[reportArgumentType]
        return weights.roll(1, 1), ids.roll(1, 1)

    return wrong


def test_the_checks_of_order_can_fail():
    for check in (check_columns_are_in_rank_order, check_ties_of_bfloat16_go_to_the_smaller_id):
        with pytest.raises(AssertionError):
            check(_swapped(_by_op))
    with pytest.raises(AssertionError):
        check_every_row_is_written_and_no_other(_swapped(_by_op), (4,))


def _deepseek(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """Ids of `fused_topk_deepseek` with one group, into memory that holds ids of no expert."""
    values = torch.full((len(scores), top_k), float("nan"))
    ids = torch.full((len(scores), top_k), 0x7FFFFFFF, dtype=torch.int32)
    fused_topk_deepseek(scores, bias, 1, 1, top_k, 1.0, values, ids)
    assert values.isfinite().all()
    return ids


@pytest.mark.parametrize("experts", [129, 160, 256, 384])
@pytest.mark.parametrize("top_k", range(1, 8))
@pytest.mark.usefixtures("poisoned_memory")
def test_one_group_of_many_experts_merges_no_unset_slot(experts: int, top_k: int):
    scores, bias = torch.randn(5, experts), torch.randn(experts)
    keys = (scores.double().sigmoid() + bias.double()).tolist()
    expected = [sorted(range(experts), key=lambda e: -row[e])[:top_k] for row in keys]
    assert _deepseek(scores, bias, top_k).tolist() == expected


@pytest.mark.parametrize("experts", [1, 2, 3, 5, 31, 33, 127, 160, 384, 1024, 2048])
@pytest.mark.parametrize("top_k", [1, 7, 8, 9, 22, 32])
def test_a_shape_is_routed_or_refused(experts: int, top_k: int):
    """No size between two compiled tiers does nothing: the ids are right, or the method cannot be made."""
    if top_k > experts:
        with pytest.raises(ConfigError, match=f"top_k={top_k}"):
            _method(Kind.Sigmoid, experts, top_k)
        return
    logits = torch.linspace(-4, 4, experts)[torch.randperm(experts)].expand(2, -1).contiguous()
    for kind in (Kind.Default, Kind.Sigmoid, Kind.Renormalize, Kind.MiniMax2):
        method = _method(kind, experts, top_k)
        buffer = torch.full((2, top_k), -1, dtype=torch.int16)
        route(logits, method, routing_bias=_bias(method), routing_replay_out=buffer)
        assert buffer.tolist() == [logits[0].argsort(descending=True)[:top_k].tolist()] * 2


def _moe(method: RoutingMethod, logits: Tensor, **more: object) -> object:
    generator = torch.Generator().manual_seed(1)
    experts = method.num_experts + method.num_fused_shared_experts
    return bf16_moe(
        logits, _bias(method), torch.randn(len(logits), 16, generator=generator),
        torch.randn(experts, 16, 16, generator=generator) / 4, torch.randn(experts, 16, 8, generator=generator) / 4,
        method.num_experts, method.top_k, method.n_group, method.topk_group, 8, 0, method.num_experts,
        method.routed_scaling_factor, method.type,
        **{"norm_topk_prob": method.norm_topk_prob, "num_fused_shared_experts": method.num_fused_shared_experts, **more},
    )  # fmt: skip  # pyright: ignore[reportArgumentType, reportCallIssue]


@pytest.mark.parametrize("method", _all_methods(), ids=lambda m: f"{m.type.name}-{m.n_group}-{m.num_columns}")  # fmt: skip
@pytest.mark.usefixtures("poisoned_memory")
def test_every_entry_point_records_with_every_method_and_changes_no_bit(method: RoutingMethod):
    logits = torch.randn(5, method.num_experts)
    _, ids = route(logits, method, routing_bias=_bias(method))
    without = _moe(method, logits)
    assert isinstance(without, Tensor)
    assert without.isfinite().all()
    buffer, memory = _guarded(7, method.top_k)
    assert torch.equal(_moe(method, logits, routing_replay_out=buffer), without)  # pyright: ignore[reportArgumentType]
    assert buffer[:5].tolist() == ids[:, : method.top_k].tolist()
    assert (memory[:7] == -7).all()
    assert (memory[12:] == -7).all()
    forced = buffer[:5].clone()
    assert torch.equal(_moe(method, logits, routing_replay_in=forced), without)  # pyright: ignore[reportArgumentType]
    parts = _moe(method, logits, do_finalize=False, routing_replay_out=torch.zeros_like(buffer))
    assert isinstance(parts, tuple)
    gemm2_output, weights, index = parts
    assert (gemm2_output.dtype, weights.dtype, index.dtype) == (torch.float32, torch.float32, torch.int32)  # fmt: skip
    assert weights.shape == (5, method.num_columns)
    # The twin: another expert in one row changes that row alone.
    forced[2, 0] = next(e for e in range(method.num_experts) if e not in forced[2].tolist())
    again = _moe(method, logits, routing_replay_in=forced)
    assert isinstance(again, Tensor)
    changed = ((again - without).abs() > 1e-5).any(dim=1)
    assert changed.tolist() == [False, False, True, False, False]


def _routed_moe(topk_ids: object, buffer: Tensor | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    rows = len(topk_ids[0]) if isinstance(topk_ids, tuple) else len(topk_ids)  # pyright: ignore[reportArgumentType]
    return bf16_routed_moe(
        topk_ids, torch.randn(rows, 16, generator=generator), torch.randn(24, 16, 16, generator=generator) / 4,
        torch.randn(24, 16, 8, generator=generator) / 4, 24, 3, None, None, 8, 0, 24, routing_replay_out=buffer,
    )  # fmt: skip  # pyright: ignore[reportArgumentType, reportReturnType]


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.usefixtures("poisoned_memory")
def test_given_routing_is_recorded_and_changes_no_bit(is_packed: bool):
    ids = torch.stack([torch.randperm(24)[:3] for _ in range(5)]).int()
    weights = torch.rand(5, 3).bfloat16().float()
    given: object = (ids, weights)
    if is_packed:
        given = (ids << 16) | (weights.bfloat16().view(torch.int16).int() & 0xFFFF)
    without = _routed_moe(given)
    buffer, memory = _guarded(7, 3)
    assert torch.equal(_routed_moe(given, buffer), without)
    assert buffer[:5].tolist() == ids.tolist()
    assert (memory[:7] == -7).all()
    assert (memory[12:] == -7).all()
    # The twin: another expert in one row changes that row alone.
    changed = ids.clone()
    changed[3, 1] = next(e for e in range(24) if e not in ids[3].tolist())
    differs = ((_routed_moe((changed, weights)) - without).abs() > 1e-5).any(dim=1)
    assert differs.tolist() == [False, False, False, True, False]


@pytest.mark.usefixtures("poisoned_memory")
def test_given_ids_of_padding_and_repeated_ones_add_nothing():
    ids = torch.tensor([[4, -1, 9], [-1, -1, -1], [9, 4, 4], [7, 24, 2]], dtype=torch.int32)
    weights = torch.rand(4, 3) + 0.1
    buffer = torch.full((6, 3), -7, dtype=torch.int16)
    out = _routed_moe((ids, weights), buffer)
    assert buffer[:4].tolist() == ids.tolist()
    assert (buffer[4:] == -7).all()
    assert (out[1] == 0).all()
    # What does not count weighs nothing: the same with weight 0 on experts that do count.
    clean = torch.tensor([[4, 0, 9], [0, 1, 2], [9, 4, 0], [7, 0, 2]], dtype=torch.int32)
    counts = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 0], [1, 0, 1]])
    torch.testing.assert_close(out, _routed_moe((clean, weights * counts)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [Kind.SigmoidRenorm, Kind.MiniMax2, Kind.DeepSeekV3])
def test_norm_topk_prob_reaches_the_weights(kind: Kind):
    logits = torch.randn(4, 24)
    outputs = []
    for norm_topk_prob in (True, False):
        method = _method(kind, 24, 3, norm_topk_prob=norm_topk_prob)
        parts = _moe(method, logits, do_finalize=False)
        assert isinstance(parts, tuple)
        outputs.append(parts[1])
    sums = outputs[1].sum(dim=1, keepdim=True)
    assert not torch.allclose(sums, torch.ones(4, 1), atol=1e-2)
    torch.testing.assert_close(outputs[0], outputs[1] / sums, rtol=2e-6, atol=0)


def check_rows_beyond_int32_are_addressed(run: Route, folder: Path) -> None:
    """Two rows of logits 2^31 + 64 elements apart, in a file that has no pages between them."""
    stride = 2**31 + 64
    (folder / "rows").touch()
    memory = torch.from_file(str(folder / "rows"), shared=True, size=stride + 24, dtype=torch.bfloat16)  # fmt: skip
    logits = memory.as_strided((2, 24), (stride, 1))
    logits.copy_(torch.stack([torch.arange(24.0), -torch.arange(24.0)]))
    recorded = torch.full((2, 3), -7, dtype=torch.int16)
    run(logits, _method(Kind.Renormalize, 24, 3), None, None, recorded)
    assert recorded.tolist() == [[23, 22, 21], [0, 1, 2]]


def test_rows_beyond_int32_are_addressed(tmp_path: Path):
    check_rows_beyond_int32_are_addressed(_by_op, tmp_path)


def test_no_op_tunes_while_it_runs():
    """One call with a buffer for the largest batch: the rows of other batches keep their sentinel, and nothing is timed."""
    method = _method(Kind.Renormalize, 24, 3)
    buffer = torch.full((8192, 3), -1, dtype=torch.int16)
    for _ in range(2):
        _moe(method, torch.randn(5, 24), routing_replay_out=buffer)
    assert (buffer[:5] >= 0).all()
    assert (buffer[5:] == -1).all()
    calls = re.compile(r"do_bench|triton\.autotune|elapsed_time|perf_counter")
    timed = [path.name for path in KERNELS.rglob("*.py") if calls.search(path.read_text())]
    assert [name for name in timed if not name.startswith("tuning")] == []


def test_outputs_are_summed_without_atomics():
    paths = [*KERNELS.glob("experts/*.py"), *KERNELS.glob("fused_moe/*.py")]
    assert paths
    assert [path.name for path in paths if re.search(r"\batomic_\w+\(", path.read_text())] == []
    # Sums in float32, rank 0 first: 1e8 + 1 - 1e8 is 0 in this order and 1 in another.
    rows = torch.tensor([[1e8], [1.0], [-1e8]])
    index = torch.tensor([0, 1, 2, 2, 0, 1], dtype=torch.int32)
    out = combine_reference(rows, torch.ones(2, 3), index)
    assert out.tolist() == [[0.0], [1.0]]


def test_every_layer_of_a_device_cache_is_taken_as_it_is():
    spec = RoutingSpec(layer_ids=(1, 2, 3), num_layers=4, num_experts=24, top_k=3)
    cache = DeviceCache(spec, num_rows=9, device=torch.device("cpu"))
    assert len({cache.layer(layer).data_ptr() for layer in range(3)}) == 3
    logits = torch.randn(5, 24)
    _, ids = route(logits, _method(Kind.Renormalize, 24, 3), routing_replay_out=cache.layer(1))
    assert cache.layer(1)[:5].tolist() == ids.tolist()
    assert (cache.layer(1)[5:] == -1).all()
    assert (cache.layer(0) == -1).all()
    assert (cache.layer(2) == -1).all()


_INTERPRETED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from kernels import test_pitfalls as pitfalls

torch.manual_seed(0)
for check in pitfalls.ROUTING_CHECKS:
    check(pitfalls.by_kernel)
pitfalls.check_every_row_is_written_and_no_other(pitfalls.by_kernel, (0, 1, 5))
pitfalls.check_rows_beyond_int32_are_addressed(pitfalls.by_kernel, Path(sys.argv[2]))
for experts in (129, 384):
    for top_k in (1, 5, 7):
        logits, bias = torch.randn(1, experts), torch.randn(experts)
        method = pitfalls._method(pitfalls.Kind.DeepSeekV3, experts, top_k)
        ids = pitfalls.by_kernel(logits, method, bias, None, None)[1]
        assert torch.equal(ids, pitfalls._deepseek(logits, bias, top_k)), (experts, top_k)
print("same")
"""


def test_interpreted_router(tmp_path: Path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED, str(Path(__file__).parents[1]), str(tmp_path)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "same", done.stderr[-3000:]
