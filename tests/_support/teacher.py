"""Transformers, teacher-forced on an engine's tokens: the other implementation."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from routing_replay.engine import RequestOutput
from routing_replay.replay import Padded, attach, observe_expert_ids
from routing_replay.trace import RoutingTrace

MARGIN = 1e-5


@dataclass(frozen=True, slots=True)
class Teacher:
    """What Transformers computes for one sequence.

    Attributes:
        expert_ids: int64 `[tokens - 1, L, K]`, as the experts received them.
        is_clear: bool `[tokens - 1, L]`, neighbouring scores are further apart than `MARGIN`.
        logprobs: float64 `[G]` of the generated tokens.
    """

    expert_ids: NDArray[np.int64]
    is_clear: NDArray[np.bool_]
    logprobs: NDArray[np.float64]


def load_teacher(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def all_tokens(output: RequestOutput) -> list[int]:
    return [*output.prompt_token_ids, *output.outputs[0].token_ids]


@torch.no_grad()
def teach(
    model: torch.nn.Module, output: RequestOutput, forced: RoutingTrace | None = None
) -> Teacher:
    """Run a sequence through Transformers, natively or at given experts."""
    tokens = all_tokens(output)
    scores: list[torch.Tensor] = []
    routers = [m for name, m in model.named_modules() if name.endswith(".mlp.gate")]
    hooks = [r.register_forward_hook(lambda _m, _i, out: scores.append(out[0])) for r in routers]
    try:
        with attach(model) as handle, observe_expert_ids(model) as observed:
            layout = Padded(lengths=(len(tokens),), seq_len=len(tokens))
            context = handle.disabled() if forced is None else handle.replay([forced], layout)
            with context:
                logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    ids = observed.stacked().numpy()[:-1]
    top_k = ids.shape[2]
    ranked = torch.stack(scores, 1)[:-1].softmax(-1).sort(-1, descending=True).values
    gaps = (ranked[..., :top_k] - ranked[..., 1 : top_k + 1]).amin(-1)
    logprobs = logits[:-1].double().log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])
    first = len(output.prompt_token_ids) - 1
    return Teacher(ids, (gaps > MARGIN).numpy(), logprobs[first:, 0].numpy())


def engine_logprobs(output: RequestOutput) -> NDArray[np.float64]:
    completion = output.outputs[0]
    assert completion.logprobs is not None
    pairs = zip(completion.logprobs, completion.token_ids, strict=True)
    return np.array([entry[token].logprob for entry, token in pairs])


def num_wrong(trace: RoutingTrace, teacher: Teacher) -> int:
    """Count (token, layer) pairs whose ids differ in any position where the scores are clear."""
    assert trace.ids.shape == teacher.expert_ids.shape
    differs = (trace.ids.astype(np.int64) != teacher.expert_ids).any(axis=2)
    return int((differs & teacher.is_clear).sum())


def with_one_id_changed(trace: RoutingTrace, row: int, slot: int) -> RoutingTrace:
    """The same trace but for one id, replaced by an expert that the row does not hold."""
    ids = trace.ids.copy()
    unused = np.setdiff1d(np.arange(trace.num_experts), ids[row, slot])
    ids[row, slot, 0] = unused[len(unused) // 2]
    return with_ids(trace, ids)


def with_ids(trace: RoutingTrace, ids: NDArray[np.integer]) -> RoutingTrace:
    return RoutingTrace(
        ids=np.ascontiguousarray(ids, trace.ids.dtype),
        valid=trace.valid,
        start=trace.start,
        layer_ids=trace.layer_ids,
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        token_digest=trace.token_digest,
        weights_version=trace.weights_version,
    )


def check_against_teacher(folder: Path, outputs: list[RequestOutput]) -> None:
    """Native ids and logprobs are Transformers'; each comparison would see one changed id."""
    teacher_model = load_teacher(folder)
    num_clear = 0
    for index, output in enumerate(outputs):
        teacher = teach(teacher_model, output)
        trace = output.outputs[0].routing
        trace.validate(all_tokens(output))
        assert trace.num_rows == len(all_tokens(output)) - 1
        assert num_wrong(trace, teacher) == 0
        np.testing.assert_allclose(engine_logprobs(output), teacher.logprobs, atol=1e-4, rtol=0)
        num_clear += int(teacher.is_clear.sum())
        # The twin: one changed id at a clear place must be seen.
        row, slot = np.argwhere(teacher.is_clear)[index % int(teacher.is_clear.sum())]
        assert num_wrong(with_one_id_changed(trace, row, slot), teacher) == 1
    total = sum(output.outputs[0].routing.ids.shape[0] for output in outputs)
    assert num_clear >= 0.9 * total * outputs[0].outputs[0].routing.num_moe_layers


def random_rows(trace: RoutingTrace, seed: int) -> RoutingTrace:
    """Experts that no router would choose: random, distinct, in random order."""
    rng = np.random.default_rng(seed)
    rows = rng.permuted(
        np.broadcast_to(np.arange(trace.num_experts), (*trace.ids.shape[:2], trace.num_experts)),
        axis=-1,
    )
    return with_ids(trace, rows[..., : trace.top_k])
