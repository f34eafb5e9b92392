"""The diagnosis of responses raises no error on what a trained model's routers really pick, and still finds faults in it."""

import numpy as np
import pytest

from routing_replay import LLM, SamplingParams
from routing_replay.assets import tiny_moe_path
from routing_replay.assets.arithmetic import make_problems
from routing_replay.trace import ModelRouting, RoutingTrace
from routing_replay.trace.importers import diagnose, find_shared_rows, import_megatron

ROUTING = ModelRouting.from_config(tiny_moe_path())

Requests = dict[str, tuple[RoutingTrace, list[int]]]


@pytest.fixture(scope="module")
def requests() -> Requests:
    """Answers to questions that differ by names and numbers, and random tokens; ids sorted, as some engines send them."""
    llm = LLM(tiny_moe_path(), dtype="float32", enable_return_routed_experts=True)
    questions = [[{"role": "user", "content": item.question}] for item in make_problems(48, seed=3)]
    params = SamplingParams(max_tokens=60, seed=1)
    outputs = llm.chat(questions, params, use_tqdm=False)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(16, 256, 60).tolist() for _ in range(8)]
    outputs += llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)
    found: Requests = {}
    for index, output in enumerate(outputs):
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        ids = np.sort(output.outputs[0].routing.ids, axis=-1)
        trace = import_megatron(ids, token_ids=tokens, routing=ROUTING)
        found[str(index)] = (trace, tokens)
    return found


def test_no_response_is_refused(requests: Requests):
    for trace, tokens in requests.values():
        findings = diagnose(trace.ids, token_ids=tokens, routing=ROUTING, all_layers=False)
        assert [item for item in findings if item.severity == "error"] == []


def test_no_request_is_taken_for_another(requests: Requests):
    assert find_shared_rows(requests) == ()


def test_planted_faults_are_found(requests: Requests):
    trace, tokens = requests["50"]
    frozen = trace.ids.copy()
    frozen[30:] = frozen[29]
    codes = [item.code for item in diagnose(frozen, token_ids=tokens, routing=ROUTING, all_layers=False) if item.severity == "error"]  # fmt: skip
    assert codes == ["frozen_rows"]
    other, other_tokens = requests["51"]
    stolen = other.ids.copy()
    stolen[20:40] = trace.ids[20:40]
    planted = import_megatron(stolen, token_ids=other_tokens, routing=ROUTING)
    (found,) = find_shared_rows({**requests, "51": (planted, other_tokens)})
    assert (found.code, found.row) == ("rows_of_another_request", 20)
