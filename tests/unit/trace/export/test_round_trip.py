"""What an exporter writes, the importer of the same form reads back, row by row."""

from collections.abc import Callable

import numpy as np
import pytest

from routing_replay.trace import ModelRouting, RoutingTrace
from routing_replay.trace.export import (
    to_nemo_rl_envelope,
    to_prime_rl,
    to_sglang,
    to_vllm,
    to_vllm_generate,
    to_vllm_split,
)
from routing_replay.trace.importers import (
    import_nemo_rl,
    import_prime_rl,
    import_sglang,
    import_vllm,
    import_vllm_split,
)
from unit.trace.trace_cases import invalid_rows, random_trace, tokens_of

RoundTrip = Callable[[RoutingTrace, ModelRouting], RoutingTrace]
TOKENS = tokens_of(1, 13)


def _vllm(trace: RoutingTrace, routing: ModelRouting) -> RoutingTrace:
    return import_vllm(to_vllm(trace, num_tokens=13), token_ids=TOKENS, routing=routing)


def _vllm_generate(trace: RoutingTrace, routing: ModelRouting) -> RoutingTrace:
    field = to_vllm_generate(trace, num_tokens=13)
    return import_vllm(dict(field), token_ids=TOKENS, routing=routing)


def _vllm_split(trace: RoutingTrace, routing: ModelRouting) -> RoutingTrace:
    fields = to_vllm_split(trace, num_tokens=13, num_prompt_tokens=5)
    return import_vllm_split(
        fields["prompt_routed_experts"].tolist(),
        fields["routed_experts"].tolist(),
        prompt_token_ids=TOKENS[:5],
        token_ids=TOKENS,
        routing=routing,
    )


def _sglang(trace: RoutingTrace, routing: ModelRouting) -> RoutingTrace:
    return import_sglang(to_sglang(trace, num_tokens=13), token_ids=TOKENS, routing=routing)


def _prime_rl(trace: RoutingTrace, routing: ModelRouting) -> RoutingTrace:
    struct = to_prime_rl(trace, num_tokens=13)
    return import_prime_rl(dict(struct), token_ids=TOKENS, routing=routing)


def _nemo_rl(trace: RoutingTrace, routing: ModelRouting) -> RoutingTrace:
    text = to_nemo_rl_envelope(trace, num_tokens=13, on_missing="native")
    return import_nemo_rl(text, token_ids=TOKENS, routing=routing)


def _routing(trace: RoutingTrace) -> ModelRouting:
    return ModelRouting(
        layer_ids=trace.layer_ids,
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
    )


@pytest.mark.parametrize(
    "through", [_vllm, _vllm_generate, _vllm_split, _sglang, _prime_rl, _nemo_rl]
)
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 1), (64, 6), (128, 8), (256, 8), (512, 10)])
@pytest.mark.parametrize("dense", [True, False])
def test_round_trip_is_exact(through: RoundTrip, num_experts: int, top_k: int, dense: bool):
    layers = {} if dense else {"layer_ids": range(3), "num_layers": 3}
    trace = random_trace(1, rows=12, num_experts=num_experts, top_k=top_k, ordered=False, **layers)
    assert through(trace, _routing(trace)).equals(trace)


def test_round_trip_keeps_gaps_where_the_form_has_them():
    trace = invalid_rows(random_trace(1, rows=12, ordered=False), [0, 4, 11])
    back = _nemo_rl(trace, _routing(trace))
    assert back.valid.tolist() == trace.valid.tolist()
    assert np.array_equal(back.ids, trace.ids)
    whole = random_trace(1, rows=12, ordered=False)
    later = _vllm_generate(whole.slice(3, 12), _routing(whole))
    assert later.equals(whole.slice(3, 12))
