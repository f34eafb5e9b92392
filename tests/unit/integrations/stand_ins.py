"""Stand-ins for the servers of vLLM and SGLang: they answer in the engines' forms, and can be given a fault."""

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx
import numpy as np
from numpy.typing import NDArray

from routing_replay.integrations.canary import CanaryConfig
from routing_replay.trace import ModelRouting

SMALL = ModelRouting(layer_ids=(1, 2, 3), num_layers=4, num_experts=32, top_k=4)
CANARY = CanaryConfig(num_prompt_tokens=20, num_long_prompt_tokens=40, max_tokens=4)

Rows = NDArray[np.int64]
Fault = Callable[["FakeRouter", tuple[int, ...], Rows], Rows]


@dataclass
class FakeRouter:
    """Picks experts from a token and all before it, as a causal model does; row t is that of token t.

    `fault` gets the router, the tokens and the right rows `[T - 1, decoder layers, K]`, and returns what is sent.
    """

    routing: ModelRouting = SMALL
    fault: Fault | None = None
    served: list[tuple[int, ...]] = field(default_factory=list)

    def rows(self, tokens: Sequence[int]) -> Rows:
        shape = (len(tokens), self.routing.num_layers, self.routing.top_k)
        ids = np.zeros(shape, np.int64)
        state = 1
        for row, token in enumerate(tokens):
            state = (state * 1_000_003 + token + 1) % (1 << 61)
            rng = np.random.default_rng(state)
            for layer_idx in self.routing.layer_ids:
                ids[row, layer_idx] = rng.permutation(self.routing.num_experts)[: shape[2]]
        return ids

    def next_token(self, tokens: Sequence[int], choice: int) -> int:
        return 16 + (sum(tokens) * 7 + len(tokens) + 31 * choice) % 200

    def complete(
        self, prompt: Sequence[int], max_tokens: int, choice: int
    ) -> tuple[list[int], Rows]:
        tokens = list(prompt)
        for _ in range(max_tokens):
            tokens.append(self.next_token(tokens, choice))
        rows = self.rows(tokens)[:-1]
        if self.fault is not None:
            rows = self.fault(self, tuple(tokens), rows)
        self.served.append(tuple(tokens))
        return tokens[len(prompt) :], rows


def npy_text(ids: NDArray[np.integer]) -> str:
    buffer = io.BytesIO()
    np.save(buffer, ids)
    return base64.b64encode(buffer.getvalue()).decode()


@dataclass
class FakeVllm:
    """Answers as vLLM 0.30.0 does; checked against recorded answers in test_vllm_server.py."""

    router: FakeRouter = field(default_factory=FakeRouter)
    version: str = "0.30.0"
    models: tuple[str, ...] = ("tiny",)
    captures: bool = True
    max_model_len: int = 64
    bodies: list[dict[str, object]] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        answer = self.answer(request.url.path, request.content)
        return httpx.Response(200, content=json.dumps(answer))

    def answer(self, path: str, content: bytes) -> object:
        if path == "/version":
            return {"version": self.version}
        if path == "/v1/models":
            data = [{"id": name, "max_model_len": self.max_model_len} for name in self.models]
            return {"object": "list", "data": data}
        body = json.loads(content)
        if path == "/tokenize":
            text = body.get("prompt") or body["messages"][0]["content"]
            return {"tokens": [16 + ord(letter) % 100 for letter in text]}
        assert path == "/v1/completions"
        self.bodies.append(body)
        return {"object": "text_completion", "choices": [self._choice(body, i) for i in range(body["n"])]}  # fmt: skip

    def _choice(self, body: dict, index: int) -> dict[str, object]:
        tokens, rows = self.router.complete(body["prompt"], body["max_tokens"], index)
        ids = rows.astype(np.uint8) if rows.min(initial=0) >= 0 else rows.astype(np.int32)
        return {
            "index": index,
            "text": f"text {index}",
            "logprobs": {"token_logprobs": [-0.5 - i for i in range(len(tokens))]},
            "finish_reason": "length",
            "token_ids": tokens,
            "prompt_token_ids": body["prompt"],
            "routed_experts": npy_text(ids) if self.captures else None,
        }


@dataclass
class FakeSglang:
    """Answers as SGLang 0.5.23's sources say; no recording of a real server exists here."""

    router: FakeRouter = field(default_factory=FakeRouter)
    version: str = "0.5.23"
    info: dict[str, object] = field(default_factory=lambda: {"enable_return_routed_experts": True})
    meta: dict[str, object] = field(default_factory=dict)
    bodies: list[dict[str, object]] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/server_info":
            return httpx.Response(200, json={"version": self.version, **self.info})
        assert request.url.path == "/generate"
        body = json.loads(request.content)
        self.bodies.append(body)
        count = body["sampling_params"]["n"]
        outputs = [self._output(body, index) for index in range(count)]
        return httpx.Response(200, json=outputs if count > 1 else outputs[0])

    def _output(self, body: dict, index: int) -> dict[str, object]:
        count = body["sampling_params"]["max_new_tokens"]
        tokens, rows = self.router.complete(body["input_ids"], count, index)
        return {
            "text": f"text {index}",
            "output_ids": tokens,
            "meta_info": {
                "id": "0123456789abcdef",
                "finish_reason": {"type": "length", "length": count},
                "prompt_tokens": len(body["input_ids"]),
                "weight_version": "default",
                "num_retractions": 0,
                "input_token_logprobs": [],
                "output_token_logprobs": [
                    [-0.5 - i, token, None] for i, token in enumerate(tokens)
                ],
                "output_token_logprobs_length": len(tokens),
                "completion_tokens": len(tokens),
                "cached_tokens": 0,
                "routed_experts": base64.b64encode(rows.astype("<i4").tobytes()).decode(),
                "e2e_latency": 0.1,
                **self.meta,
            },
        }
