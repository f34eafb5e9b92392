"""Whole HTTP bodies of engines become completions with traces."""

import copy

import numpy as np
import pytest

from routing_replay.errors import TraceFormatError
from routing_replay.trace.importers import RoutingDiagnosisError, import_response
from unit.trace.importers.import_cases import (
    MODEL,
    nemo_envelope,
    npy_base64,
    random_ids,
    random_tokens,
    sglang_base64,
    struct_of,
)

RNG = np.random.default_rng(8)
PROMPT, COMPLETION = random_tokens(RNG, 7), random_tokens(RNG, 5)
IDS = random_ids(RNG, 11, MODEL)
MOE = IDS[:, list(MODEL.layer_ids)]
LOGPROBS = [-0.5, -1.0, -0.25, -2.0, -0.125]

VLLM_COMPLETION = {
    "object": "text_completion",
    "choices": [
        {"index": 0, "text": "x", "prompt_token_ids": PROMPT, "token_ids": COMPLETION, "routed_experts": npy_base64(IDS),
         "logprobs": {"token_logprobs": LOGPROBS}},
    ],
}  # fmt: skip
VLLM_CHAT = {
    "prompt_token_ids": PROMPT,
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "x"}, "token_ids": COMPLETION,
         "routed_experts": npy_base64(IDS), "logprobs": {"content": [{"token": "a", "logprob": p} for p in LOGPROBS]}},
    ],
}  # fmt: skip
VLLM_SPLIT = {
    "prompt_token_ids": PROMPT,
    "prompt_routed_experts": IDS[:7].tolist(),
    "choices": [{"token_ids": COMPLETION, "routed_experts": IDS[7:].tolist()}],
}
VLLM_GENERATE = {"choices": [{"token_ids": COMPLETION, "routed_experts": struct_of(IDS, start=0)}]}
SGLANG = {
    "text": "x",
    "output_ids": COMPLETION,
    "meta_info": {
        "routed_experts": sglang_base64(IDS),
        "output_token_logprobs": [[p, t, None] for p, t in zip(LOGPROBS, COMPLETION, strict=True)],
    },
}
SGLANG_OPENAI = {
    "prompt_token_ids": PROMPT,
    "choices": [{"token_ids": COMPLETION}],
    "sglext": {"routed_experts": sglang_base64(IDS)},
}
NEMO = {
    "choices": [
        {"message": {"prompt_token_ids": PROMPT, "generation_token_ids": COMPLETION,
                     "routed_experts": nemo_envelope(np.concatenate([MOE, MOE[:1] * 0 + np.arange(4, dtype=np.uint8)]))}},
    ],
}  # fmt: skip
MEGATRON = {"prompt_token_ids": PROMPT, "choices": [{"token_ids": COMPLETION, "moe_topk_indices": MOE.tolist()}]}  # fmt: skip

BODIES = {
    "vllm completion": (VLLM_COMPLETION, "vllm", True),
    "vllm chat": (VLLM_CHAT, "vllm", True),
    "vllm split": (VLLM_SPLIT, "vllm", False),
    "vllm generate": (VLLM_GENERATE, "vllm", False),
    "sglang": (SGLANG, "sglang", True),
    "sglang batch": ([SGLANG, SGLANG], "sglang", True),
    "sglang openai": (SGLANG_OPENAI, "sglang", False),
    "nemo-rl": (NEMO, "nemo-rl", False),
    "megatron": (MEGATRON, "megatron", False),
}


@pytest.mark.parametrize("name", sorted(BODIES))
def test_every_body_is_read(name: str):
    body, source, has_logprobs = BODIES[name]
    choices = import_response(body, routing=MODEL, prompt_token_ids=PROMPT)  # pyright: ignore[reportArgumentType]
    assert [choice.index for choice in choices] == list(range(len(choices)))
    for choice in choices:
        assert choice.source == source
        assert choice.prompt_token_ids == tuple(PROMPT)
        assert choice.token_ids == tuple(COMPLETION)
        assert choice.logprobs == (tuple(LOGPROBS) if has_logprobs else None)
        np.testing.assert_array_equal(choice.trace.ids, MOE)
        choice.trace.validate([*PROMPT, *COMPLETION])


def test_several_choices_keep_their_own_rows():
    other, ids = random_tokens(RNG, 3), random_ids(RNG, 9, MODEL)
    body = copy.deepcopy(VLLM_CHAT)
    body["choices"].append({"token_ids": other, "routed_experts": npy_base64(ids)})  # pyright: ignore[reportIndexIssue]
    first, second = import_response(body, routing=MODEL)
    assert (first.token_ids, second.token_ids) == (tuple(COMPLETION), tuple(other))
    np.testing.assert_array_equal(second.trace.ids, ids[:, list(MODEL.layer_ids)])


def test_rows_from_a_start():
    body = copy.deepcopy(VLLM_CHAT)
    body["choices"][0]["routed_experts"] = npy_base64(IDS[4:])  # pyright: ignore[reportIndexIssue]
    (choice,) = import_response(body, routing=MODEL, start=4)
    assert (choice.trace.start, choice.trace.end) == (4, 11)
    sglang = {**SGLANG, "meta_info": {"routed_experts": sglang_base64(IDS[4:]), "routed_experts_start_len": 4}}  # fmt: skip
    (choice,) = import_response(sglang, routing=MODEL, prompt_token_ids=PROMPT)
    assert choice.trace.start == 4


@pytest.mark.parametrize("name", ["vllm chat", "sglang"])
def test_a_missing_field_is_a_finding(name: str):
    body = copy.deepcopy(BODIES[name][0])
    holder = body["choices"][0] if "choices" in body else body["meta_info"]  # pyright: ignore[reportIndexIssue]
    holder["routed_experts"] = None
    with pytest.raises(RoutingDiagnosisError, match="missing") as caught:
        import_response(body, routing=MODEL, prompt_token_ids=PROMPT)  # pyright: ignore[reportArgumentType]
    (finding,) = caught.value.findings
    assert "--enable-return-routed-experts" in str(finding)


def test_sglang_returns_the_first_choice_alone():
    body = copy.deepcopy(SGLANG_OPENAI)
    body["choices"].append({"token_ids": COMPLETION})  # pyright: ignore[reportIndexIssue]
    with pytest.raises(RoutingDiagnosisError, match="sglext"):
        import_response(body, routing=MODEL)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "accepted are responses with choices"),
        ({"choices": []}, "accepted are responses with choices"),
        ({"choices": [3]}, r"choices\[0\] is a int"),
        ([3], "response is a int"),
        ({"choices": [{"token_ids": COMPLETION}]}, "does not hold prompt_token_ids"),
        ({"prompt_token_ids": PROMPT, "choices": [{}]}, r"choices\[0\].token_ids is missing"),
        ({"prompt_token_ids": PROMPT, "choices": [{"token_ids": ["a"]}]}, "holds no integers"),
        ({"prompt_token_ids": "abc", "choices": [{"token_ids": COMPLETION}]}, "prompt_token_ids is a str"),
        ({"meta_info": 3}, "meta_info is a int"),
    ],
)  # fmt: skip
def test_bodies_of_no_known_form_are_refused(body: object, message: str):
    with pytest.raises(TraceFormatError, match=message):
        import_response(body, routing=MODEL)  # pyright: ignore[reportArgumentType]
