"""The plan of the grouped GEMMs: worked examples, and what must hold of any plan, checked without the reference's steps."""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from routing_replay.errors import ConfigError
from routing_replay.kernels import plan_permutation
from routing_replay.kernels.permutation import PermutationPlan, PermutationShape, plan_reference

EXAMPLE = torch.tensor([[2, 0], [0, 3], [0, 1], [2, 0], [0, 2]])


def _plan(ids: Tensor, experts: int, tile: int, **more: int) -> PermutationPlan:
    fields = {"local_expert_offset": 0, "num_local_experts": experts, "cluster_size": 1, **more}
    shape = PermutationShape(
        num_tokens=ids.shape[0], top_k=ids.shape[1], num_experts=experts, tile_tokens=tile, **fields
    )
    return plan_reference(ids, shape)


def _used(plan: PermutationPlan) -> tuple[list[int], list[int], list[int]]:
    rows, ctas = int(plan.total_num_padded_tokens), int(plan.num_non_exiting_ctas)
    return (
        plan.permuted_idx_to_token_idx[:rows].tolist(),
        plan.cta_idx_xy_to_batch_idx[:ctas].tolist(),
        plan.cta_idx_xy_to_mn_limit[:ctas].tolist(),
    )


def test_worked_example():
    plan = _plan(EXAMPLE, 4, 4)
    assert plan.expanded_idx_to_permuted_idx.tolist() == [12, 0, 1, 16, 2, 8, 13, 3, 4, 14]
    tokens = [0, 1, 2, 3, 4, -1, -1, -1, 2, -1, -1, -1, 0, 3, 4, -1, 1, -1, -1, -1]
    assert _used(plan) == (tokens, [0, 0, 1, 2, 3], [4, 5, 9, 15, 17])
    assert plan.shape.max_ctas == 5
    assert plan.shape.max_padded_tokens == 20


def test_worked_example_on_a_rank_with_two_experts():
    plan = _plan(EXAMPLE, 4, 4, local_expert_offset=1, num_local_experts=2)
    assert plan.expanded_idx_to_permuted_idx.tolist() == [4, -1, -1, -1, -1, 0, 5, -1, -1, 6]
    assert _used(plan) == ([2, -1, -1, -1, 0, 3, 4, -1], [0, 1], [1, 7])


@pytest.mark.parametrize(
    ("tile", "batch", "limits", "rows"),
    [
        (4, [0, 0, 0, 0, 1, 1, 2, 2, 3, 3], [2, 4, 5, 5, 9, 9, 14, 15, 17, 17], 20),
        (8, [0, 0, 1, 1, 2, 2, 3, 3], [4, 5, 9, 9, 19, 19, 25, 25], 32),
    ],
)
def test_worked_examples_of_clusters(tile: int, batch: list[int], limits: list[int], rows: int):
    plan = _plan(EXAMPLE, 4, tile, cluster_size=2)
    assert int(plan.total_num_padded_tokens) == rows
    assert _used(plan)[1:] == (batch, limits)
    # Rows do not depend on how a tile is shared out.
    alone = _plan(EXAMPLE, 4, tile)
    assert torch.equal(plan.expanded_idx_to_permuted_idx, alone.expanded_idx_to_permuted_idx)
    assert torch.equal(plan.permuted_idx_to_token_idx, alone.permuted_idx_to_token_idx)


def _check_invariants(ids: Tensor, plan: PermutationPlan) -> None:
    """What a grouped GEMM and the sum after it rely on."""
    shape = plan.shape
    first, end = shape.local_expert_offset, shape.local_expert_offset + shape.num_local_experts
    rows_of: dict[int, list[int]] = defaultdict(list)
    expanded = plan.expanded_idx_to_permuted_idx.tolist()
    tokens = plan.permuted_idx_to_token_idx.tolist()
    for token, row_ids in enumerate(ids.tolist()):
        seen: set[int] = set()
        for rank, expert in enumerate(row_ids):
            row = expanded[token * shape.top_k + rank]
            computed = (
                first <= expert < end and 0 <= expert < shape.num_experts and expert not in seen
            )
            seen.add(expert)
            assert (row >= 0) == computed
            if computed:
                assert tokens[row] == token
                rows_of[expert - first].append(row)
    total = int(plan.total_num_padded_tokens)
    assert total % shape.tile_tokens == 0
    assert total <= shape.max_padded_tokens
    used = sorted(row for rows in rows_of.values() for row in rows)
    assert len(set(used)) == len(used)
    assert [row for row, token in enumerate(tokens[:total]) if token >= 0] == used
    for rows in rows_of.values():  # each expert: from a tile of its own on, in the order of tokens
        assert rows == list(range(rows[0], rows[0] + len(rows)))
        assert rows[0] % shape.tile_tokens == 0
    starts = [rows_of[expert][0] for expert in sorted(rows_of)]
    assert starts == sorted(starts)
    # CTA by CTA: its rows belong to its expert, and every row has exactly one CTA.
    size = shape.tile_tokens // shape.cluster_size
    covered: list[int] = []
    count = int(plan.num_non_exiting_ctas)
    assert count * size == total
    for cta in range(shape.max_ctas):
        expert = int(plan.cta_idx_xy_to_batch_idx[cta])
        limit = int(plan.cta_idx_xy_to_mn_limit[cta])
        if cta >= count:
            continue
        rows = range(cta * size, min((cta + 1) * size, limit))
        assert set(rows) <= set(rows_of[expert])
        covered += rows
    assert covered == used


@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 12),
    tile=st.sampled_from([1, 3, 4, 8, 12, 16]),
    clusters=st.sampled_from([1, 2, 3, 4]),
    data=st.data(),
)
def test_any_plan_keeps_its_promises(tokens: int, experts: int, tile: int, clusters: int, data: st.DataObject):  # fmt: skip
    top_k = data.draw(st.integers(1, experts))
    first = data.draw(st.integers(0, experts - 1))
    local = data.draw(st.integers(1, experts - first))
    id_of = st.integers(-2, experts + 1)
    ids = data.draw(st.lists(st.lists(id_of, min_size=top_k, max_size=top_k), min_size=tokens, max_size=tokens))  # fmt: skip
    array = torch.tensor(ids, dtype=torch.int64).reshape(tokens, top_k)
    plan = _plan(array, experts, tile * clusters, cluster_size=clusters, local_expert_offset=first, num_local_experts=local)  # fmt: skip
    _check_invariants(array, plan)


@pytest.mark.parametrize("case", ["one expert", "none here", "one token", "uneven tile"])
def test_plans_at_the_edges(case: str):
    ids = {
        "one expert": torch.zeros(300, 1, dtype=torch.int64),
        "none here": torch.full((9, 2), -1),
        "one token": torch.tensor([[7, 3, 1]]),
        "uneven tile": torch.rand(65, 8).argsort(-1)[:, :3],
    }[case]
    plan = _plan(ids, 8, 48 if case == "uneven tile" else 16)
    _check_invariants(ids, plan)
    if case == "none here":
        assert int(plan.num_non_exiting_ctas) == int(plan.total_num_padded_tokens) == 0
    if case == "one expert":
        assert int(plan.num_non_exiting_ctas) == 19


def test_the_checks_can_fail():
    """The twin: a plan in which two rows of an expert changed places is refused by the same checks."""
    plan = _plan(EXAMPLE, 4, 4)
    plan.expanded_idx_to_permuted_idx[[1, 2]] = plan.expanded_idx_to_permuted_idx[[2, 1]]
    with pytest.raises(AssertionError):
        _check_invariants(EXAMPLE, plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": -1}, "num_tokens=-1"),
        ({"top_k": 0}, "top_k=0"),
        ({"tile_tokens": 0}, "tile_tokens=0"),
        ({"cluster_size": 3}, "tile_tokens=16 with cluster_size=3"),
        ({"local_expert_offset": 4, "num_local_experts": 5}, r"experts \[4, 9\)"),
        ({"num_tokens": 1 << 29, "top_k": 8}, "split the tokens"),
    ],
)
def test_shapes_that_cannot_be_are_refused(changes: dict[str, int], message: str):
    fields = {"num_tokens": 4, "top_k": 2, "num_experts": 8, "local_expert_offset": 0, "num_local_experts": 8,
              "tile_tokens": 16, **changes}  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        PermutationShape(**fields)


def test_both_gemms_must_read_the_plan_alike():
    plan = _plan(EXAMPLE, 4, 4, cluster_size=2)
    plan.require(tile_tokens=4, cluster_size=2)
    with pytest.raises(ConfigError, match=r"tile_tokens=8, cluster_size=1 cannot read a plan"):
        plan.require(tile_tokens=8)


def test_the_op_is_registered_properly():
    ids = EXAMPLE.int()
    torch.library.opcheck(
        torch.ops.routing_replay.plan_permutation.default, (ids, 4, 0, 4, 4, 2, False, "reference")
    )

    def rows(ids: Tensor) -> Tensor:
        plan = plan_permutation(ids, num_experts=4, tile_tokens=4)
        return plan.expanded_idx_to_permuted_idx + plan.total_num_padded_tokens

    compiled = torch.compile(rows, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), rows(ids))
    plan = plan_permutation(
        ids, num_experts=4, local_expert_offset=1, num_local_experts=2, tile_tokens=4
    )
    assert plan.expanded_idx_to_permuted_idx.tolist() == [4, -1, -1, -1, -1, 0, 5, -1, -1, 6]


@pytest.mark.parametrize(
    ("ids", "changes", "message"),
    [
        (EXAMPLE, {}, "topk_ids is torch.int64"),
        (EXAMPLE.int().flatten(), {}, "accepted is int32"),
        (EXAMPLE.int().t(), {}, "strides"),
        (EXAMPLE.int(), {"backend": "cuda"}, "backend='cuda'"),
        (EXAMPLE.int(), {"backend": "triton"}, "backend='triton' on cpu"),
        (EXAMPLE.int(), {"cluster_size": 3}, "cluster_size=3"),
    ],
)
def test_bad_arguments_are_refused_by_name(ids: Tensor, changes: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        plan_permutation(ids, num_experts=4, tile_tokens=4, **changes)  # pyright: ignore[reportArgumentType]


_INTERPRETED = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from kernels.test_permutation import _check_invariants, _used
from routing_replay.kernels.permutation import PermutationShape, plan_reference
from routing_replay.kernels.permutation._triton import launch_plan

def check(tokens, top_k, experts, first, local, tile, clusters, repeats):
    ids = torch.rand(tokens, experts).argsort(-1)[:, :top_k].int()
    if repeats:
        ids = torch.randint(-2, experts + 2, (tokens, top_k)).int()
    shape = PermutationShape(num_tokens=tokens, top_k=top_k, num_experts=experts, local_expert_offset=first,
                             num_local_experts=local, tile_tokens=tile, cluster_size=clusters)
    plan, expected = launch_plan(ids, shape, are_distinct=not repeats), plan_reference(ids, shape)
    assert plan.expanded_idx_to_permuted_idx.tolist() == expected.expanded_idx_to_permuted_idx.tolist()
    assert _used(plan) == _used(expected)
    _check_invariants(ids, plan)

for tokens in (0, 1, 5, 17):
    for repeats in (False, True):
        check(tokens, 3, 8, 0, 8, 4, 1, repeats)
        check(tokens, 2, 8, 2, 3, 12, 3, repeats)
check(1, 1, 8, 0, 8, 4, 1, False)
check(65, 8, 32, 0, 32, 16, 2, False)
check(257, 8, 16, 0, 16, 64, 1, True)
check(1030, 8, 16, 0, 16, 16, 2, False)  # two launches
check(1031, 8, 24, 3, 5, 12, 3, True)
print("same")
"""


def test_interpreted_kernel_is_the_reference(tmp_path: Path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED, str(Path(__file__).parents[1])],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "same", done.stderr[-3000:]
