"""`bf16_routed_moe` against loops, against `bf16_moe`, and in what it records."""

import pytest
import torch
from torch import Tensor

from routing_replay.kernels import RoutingMethodType, bf16_moe, bf16_routed_moe

T, E, K, H, I = 7, 8, 3, 16, 12  # noqa: E741 - the letters of the architecture page


def _weights(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (torch.randn(E, 2 * I, H) / 4).to(dtype), (torch.randn(E, H, I) / 4).to(dtype)


def _run(topk_ids: object, hidden: Tensor, weights: tuple[Tensor, Tensor], **more: object) -> Tensor:  # fmt: skip
    local = weights[0].shape[0]
    fields: dict[str, object] = {"local_expert_offset": 0, "local_num_experts": local, **more}
    return bf16_routed_moe(
        topk_ids=topk_ids, hidden_states=hidden, gemm1_weights=weights[0], gemm2_weights=weights[1], num_experts=E,
        top_k=K, n_group=None, topk_group=None, intermediate_size=I, **fields,
    )  # fmt: skip  # pyright: ignore[reportArgumentType, reportReturnType]


def _pack(ids: Tensor, weights: Tensor) -> Tensor:
    return (ids << 16) | (weights.bfloat16().view(torch.int16).int() & 0xFFFF)


def _slow(ids: list[list[int]], scales: Tensor, hidden: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:  # fmt: skip
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for token, row in enumerate(ids):
        for rank, expert in enumerate(row):
            if not 0 <= expert < E or expert in row[:rank]:
                continue
            gate, up = (weights[0][expert].double() @ hidden[token].double()).chunk(2)
            value = weights[1][expert].double() @ (torch.nn.functional.silu(gate) * up)
            out[token] += scales[token, rank].double() * value
    return out


IDS = [[0, 1, 2], [5, 5, 3], [-1, 4, 7], [8, 6, -1], [-1, -1, -1], [7, 0, 7], [3, 30000, 1]]


@pytest.mark.usefixtures("poisoned_memory")
def test_given_ids_and_weights_are_used_and_recorded_as_given():
    ids, scales, hidden, weights = torch.tensor(IDS).int(), torch.rand(T, K), torch.randn(T, H), _weights()  # fmt: skip
    recorded = torch.full((T + 2, K), -7, dtype=torch.int16)
    out = _run((ids, scales), hidden, weights, routing_replay_out=recorded)
    torch.testing.assert_close(out.double(), _slow(IDS, scales, hidden, weights), atol=2e-6, rtol=2e-5)  # fmt: skip
    assert recorded.tolist() == [*IDS, [-7] * K, [-7] * K]
    assert (out[4] == 0).all()
    assert torch.equal(out, _run((ids, scales), hidden, weights))
    given = torch.full_like(out, float("nan"))
    assert _run((ids, scales), hidden, weights, output=given) is given
    assert torch.equal(given, out)
    # The twin: another id in one row changes that row, and no other.
    changed = ids.clone()
    changed[0, 1] = 4
    differs = (_run((changed, scales), hidden, weights) - out).abs().amax(1) > 1e-5
    assert differs.tolist() == [True, *[False] * (T - 1)]


def test_packed_ids_are_the_same_as_ids_with_bfloat16_weights():
    ids, hidden, weights = torch.tensor(IDS).int(), torch.randn(T, H), _weights()
    scales = torch.randn(
        T, K
    ).bfloat16()  # weights may be negative, which sets the sign of the low half
    recorded = torch.full((T, K), -7, dtype=torch.int16)
    packed = _run(_pack(ids, scales), hidden, weights, routing_replay_out=recorded)
    assert torch.equal(packed, _run((ids, scales), hidden, weights))
    assert torch.equal(packed, _run((ids, scales.float()), hidden, weights))
    assert recorded.tolist() == IDS


def test_an_id_that_is_no_int16_is_recorded_as_missing():
    ids = torch.tensor([[65536, 1, -65535]] * T).int()
    recorded = torch.zeros(T, K, dtype=torch.int16)
    _run((ids, torch.rand(T, K)), torch.randn(T, H), _weights(), routing_replay_out=recorded)
    assert recorded.tolist() == [[-1, 1, -1]] * T  # not 0 and 1, which are experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_routed_form_equals_the_fused_router(dtype: torch.dtype):
    logits, hidden, weights = torch.randn(T, E), torch.randn(T, H).to(dtype), _weights(dtype)
    recorded = torch.full((T, K), -1, dtype=torch.int16)
    fused = bf16_moe(
        logits, None, hidden, *weights, E, K, None, None, I, 0, E,
        routing_method_type=RoutingMethodType.RenormalizeNaive, routing_replay_out=recorded,
    )  # fmt: skip
    assert isinstance(fused, Tensor)
    ids = recorded.int()
    scales = logits.gather(1, ids.long()).softmax(-1)
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 1e-2, "rtol": 2**-7}  # fmt: skip
    torch.testing.assert_close(_run((ids, scales), hidden, weights), fused, **tolerance)


def test_expert_parallel_ranks_add_up_and_record_global_ids():
    ids, scales, hidden, weights = torch.tensor(IDS).int(), torch.rand(T, K), torch.randn(T, H), _weights()  # fmt: skip
    total = torch.zeros(T, H)
    for first in range(0, E, 2):
        recorded = torch.full((T, K), -7, dtype=torch.int16)
        part = (weights[0][first : first + 2], weights[1][first : first + 2])
        total += _run((ids, scales), hidden, part, local_expert_offset=first, local_num_experts=2, routing_replay_out=recorded)  # fmt: skip
        assert recorded.tolist() == IDS
    torch.testing.assert_close(total, _run((ids, scales), hidden, weights), atol=1e-5, rtol=1e-5)


def test_unfinalized_parts_have_weight_zero_where_an_id_does_not_count():
    ids, scales, hidden, weights = torch.tensor(IDS).int(), torch.rand(T, K) + 1, torch.randn(T, H), _weights()  # fmt: skip
    rows, kept, index = _run((ids, scales), hidden, weights, do_finalize=False)
    counts = [[0 <= e < E and e not in row[:rank] for rank, e in enumerate(row)] for row in IDS]
    assert (kept > 0).tolist() == counts
    assert (index >= 0).reshape(T, K).tolist() == counts
    picked = rows[index.clamp_min(0).long()].reshape(T, K, H) * kept[..., None]
    torch.testing.assert_close(picked.sum(1), _run((ids, scales), hidden, weights), atol=1e-6, rtol=1e-5)  # fmt: skip


def test_no_tokens_give_an_empty_output():
    empty = torch.zeros(0, K, dtype=torch.int32)
    out = _run((empty, torch.zeros(0, K)), torch.zeros(0, H), _weights())
    assert out.shape == (0, H)


def test_registered_ops_pass_opcheck():
    ids, scales, hidden, weights = torch.tensor(IDS).int(), torch.rand(T, K), torch.randn(T, H), _weights()  # fmt: skip
    recorded = torch.full((T, K), -1, dtype=torch.int16)
    ops = torch.ops.routing_replay
    for given in ((ids, scales), (_pack(ids, scales), None)):
        arguments = (*given, hidden, *weights, E, 0, 3, recorded, None, None, None, None, None, False, "reference", False, "{}")  # fmt: skip
        torch.library.opcheck(ops.bf16_routed_moe.default, (torch.empty_like(hidden), *arguments))
        torch.library.opcheck(ops.bf16_routed_moe_unfinalized.default, arguments)


def test_compiled_whole_graph_records_the_same():
    ids, scales, hidden, weights = torch.tensor(IDS).int(), torch.rand(T, K), torch.randn(T, H), _weights()  # fmt: skip

    def layer(ids: Tensor, scales: Tensor, recorded: Tensor) -> Tensor:
        return _run((ids, scales), hidden, weights, routing_replay_out=recorded) * 2

    eager, compiled = (torch.full((T + 2, K), -1, dtype=torch.int16) for _ in range(2))
    expected = layer(ids, scales, eager)
    function = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(function(ids, scales, compiled), expected)
    assert torch.equal(eager, compiled)
