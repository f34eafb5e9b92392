"""`route_and_plan` is `route`, then `plan_permutation`, entry by entry; its kernel in the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.test_permutation import _check_invariants, _used
from kernels.test_routing import METHODS, _inputs
from routing_replay.errors import ConfigError
from routing_replay.kernels import RoutingMethod, RoutingMethodType, plan_permutation, route
from routing_replay.kernels.permutation import route_and_plan, route_and_plan_workspace

SHARED = RoutingMethod(
    type=RoutingMethodType.DeepSeekV3, num_experts=30, top_k=3, num_fused_shared_experts=2
)


@pytest.mark.parametrize("name", ["Renormalize", "grouped", "shared"])
@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize("has_workspace", [False, True])
def test_one_op_is_the_two(name: str, tokens: int, has_workspace: bool):
    method = SHARED if name == "shared" else METHODS[name]
    experts = method.num_experts + method.num_fused_shared_experts
    logits, bias = _inputs(method, tokens)
    buffer = torch.full((tokens + 1, method.top_k), -1, dtype=torch.int16)
    workspace = route_and_plan_workspace(20, device="cpu") if has_workspace else None
    weights, ids, plan = route_and_plan(
        logits, method, tile_tokens=12, cluster_size=3, local_expert_offset=4, num_local_experts=20, routing_bias=bias,
        routing_replay_out=buffer, workspace=workspace,
    )  # fmt: skip
    expected_weights, expected = route(logits, method, routing_bias=bias)
    two = plan_permutation(
        expected, num_experts=experts, tile_tokens=12, cluster_size=3, local_expert_offset=4, num_local_experts=20
    )  # fmt: skip
    assert torch.equal(weights, expected_weights)
    assert torch.equal(ids, expected)
    assert torch.equal(buffer[:tokens].int(), ids[:, : method.top_k])
    assert (buffer[tokens:] == -1).all()
    assert plan.shape == two.shape
    for mine, other in zip(plan.buffers, two.buffers, strict=True):
        assert torch.equal(mine, other)
    _check_invariants(ids, plan)


def test_one_changed_logit_changes_the_plan():
    """The twin of the comparison: it can fail."""
    method = METHODS["Renormalize"]
    logits, _ = _inputs(method, 5)
    _, ids, plan = route_and_plan(logits, method, tile_tokens=4)
    logits[3, ids[3, 0]] = -100.0
    _, _, again = route_and_plan(logits, method, tile_tokens=4)
    assert _used(again) != _used(plan)


def test_the_op_is_registered_properly():
    method = METHODS["grouped"]
    logits, bias = _inputs(method, 5)
    buffer = torch.full((7, method.top_k), -1, dtype=torch.int16)
    workspace = route_and_plan_workspace(32, device="cpu")
    fields = (
        int(method.type),
        method.top_k,
        method.n_group,
        method.topk_group,
        method.routed_scaling_factor,
        True,
        0,
    )
    op = torch.ops.routing_replay.route_and_plan.default
    torch.library.opcheck(op, (logits, bias, buffer, None, workspace, *fields, 0, 32, 4, 2, "reference"))  # fmt: skip
    torch.library.opcheck(op, (logits, bias, None, None, None, *fields, 8, 8, 4, 1, "reference"))

    def layer(logits: Tensor, buffer: Tensor) -> Tensor:
        weights, ids, plan = route_and_plan(
            logits, method, tile_tokens=4, routing_bias=bias, routing_replay_out=buffer, workspace=workspace
        )  # fmt: skip
        return weights.sum() + ids.sum() + plan.expanded_idx_to_permuted_idx

    eager, compiled = buffer.clone(), buffer.clone()
    expected = layer(logits, eager)
    function = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(function(logits, compiled), expected)
    assert torch.equal(compiled, eager)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_logits": torch.zeros(4, 31)}, r"shape \(4, 31\)"),
        ({"routing_replay_in": torch.zeros(4, 4)}, "routing_replay_in must be int16"),
        ({"routing_replay_out": torch.zeros(3, 4, dtype=torch.int16)}, "routing_replay_out dim0"),
        ({"tile_tokens": 0}, "tile_tokens=0"),
        ({"cluster_size": 3}, "cluster_size=3"),
        ({"local_expert_offset": 20, "num_local_experts": 13}, r"experts \[20, 33\)"),
        ({"workspace": torch.zeros(7, dtype=torch.int32)}, r"route_and_plan_workspace\(32, device"),
        ({"workspace": route_and_plan_workspace(33, device="cpu")}, r"expected int32 \[672\]"),
        ({"workspace": route_and_plan_workspace(32, device="cpu").float()}, "workspace is torch.float32"),
        ({"workspace": route_and_plan_workspace(32, device="meta")}, "workspace is on meta"),
        ({"backend": "triton"}, "backend='triton' on cpu"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_by_name(changes: dict[str, object], message: str):
    arguments = {"router_logits": torch.zeros(4, 32), "tile_tokens": 4, **changes}
    with pytest.raises(ConfigError, match=message):
        route_and_plan(method=METHODS["Renormalize"], **arguments)  # pyright: ignore[reportArgumentType]


_INTERPRETED = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from kernels.test_permutation import _check_invariants, _used
from kernels.test_route_and_plan import SHARED
from kernels.test_routing import METHODS, _inputs
from routing_replay.kernels.permutation import PermutationShape, plan_reference, route_and_plan_workspace
from routing_replay.kernels.permutation._triton_fused import launch_route_and_plan
from routing_replay.kernels.routing import route_reference

workspace = route_and_plan_workspace(32, device="cpu")

def check(method, tokens, first, local, tile, clusters, forced, workspace=workspace):
    logits, bias = _inputs(method, tokens, seed=tokens)
    if tokens > 3:
        logits[1] = torch.randint(-2, 3, logits[1].shape).float()
        logits[2, ::3] = float("nan")
    given = None
    if forced:
        given = torch.rand(tokens, method.num_experts).argsort(-1)[:, : method.top_k].short()
        given[::3] = -1
        if tokens > 2:
            given[1, 1] = given[1, 0]
            given[2, 1] = method.num_experts
    shape = PermutationShape(num_tokens=tokens, top_k=method.num_columns, num_experts=method.num_experts + method.num_fused_shared_experts,
                             local_expert_offset=first, num_local_experts=local, tile_tokens=tile, cluster_size=clusters)
    weights = torch.full((tokens, method.num_columns), float("nan"))
    ids = torch.full((tokens, method.num_columns), -7, dtype=torch.int32)
    recorded = torch.full((tokens + 2, method.top_k), -1, dtype=torch.int16)
    plan = launch_route_and_plan(logits, method, weights, ids, shape, routing_bias=bias, routing_replay_in=given,
                                 routing_replay_out=recorded, workspace=workspace)
    expected_weights, expected_ids = route_reference(logits, method, routing_bias=bias, routing_replay_in=given)
    expected = plan_reference(expected_ids, shape)
    assert ids.tolist() == expected_ids.tolist(), (method, tokens)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=0, equal_nan=True)
    assert recorded[:tokens].tolist() == expected_ids[:, : method.top_k].tolist()
    assert (recorded[tokens:] == -1).all()
    assert plan.expanded_idx_to_permuted_idx.tolist() == expected.expanded_idx_to_permuted_idx.tolist(), (method, tokens)
    assert _used(plan) == _used(expected)
    _check_invariants(ids, plan)

# One workspace for all: each call must leave it as the next needs it.
for tokens in (17, 1, 5, 0, 3):
    check(METHODS["Renormalize"], tokens, 0, 32, 4, 1, tokens != 17)
    check(METHODS["grouped"], tokens, 8, 20, 12, 3, tokens > 3)
check(METHODS["Renormalize"], 1, 0, 32, 4, 1, False)
check(SHARED, 9, 0, 32, 4, 1, True)
check(SHARED, 9, 28, 4, 4, 1, False)
check(METHODS["RenormalizeNaive"], 5, 0, 32, 4, 1, True, None)
check(METHODS["one"], 65, 0, 16, 16, 2, False)
print("same")
"""


def test_interpreted_kernel_is_the_reference(tmp_path: Path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED, str(Path(__file__).parents[1])],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "same", done.stderr[-3000:]


_DEPENDENT = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from routing_replay.kernels.permutation import _triton, _triton_fused
from routing_replay.kernels.routing import _triton as routing

found = {}
for module in (routing, _triton, _triton_fused):
    for name, kernel, signature, constexprs in module.compile_cases():
        if name not in ("RenormalizeNaive", "batch", "count", "place", "softmax", "one_token"):
            continue
        types = {**signature, **dict.fromkeys(constexprs, "constexpr")}
        ordered = {argument: types[argument] for argument in kernel.arg_names}
        for dependent in (False, True):
            source = ASTSource(fn=kernel, signature=ordered, constexprs={**constexprs, "PDL": dependent})
            code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
            first_load = min(code.find(word) for word in ("ld.global", "ld.volatile") if word in code)
            found[f"{name} {dependent}"] = (code.count("griddepcontrol"), code.find("griddepcontrol.wait") < first_load)
print(json.dumps(found))
"""


def test_dependent_launches_wait_before_they_load(tmp_path: Path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", _DEPENDENT], env=environment, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 12
    for name, (count, waits_first) in found.items():
        assert (count, waits_first) == (2, True) if name.endswith("True") else count == 0, name


@pytest.mark.parametrize("count", [0, -1])
def test_a_workspace_for_no_expert_is_refused(count: int):
    with pytest.raises(ConfigError, match=f"num_local_experts={count}; accepted is 1 or more"):
        route_and_plan_workspace(count, device="cpu")
