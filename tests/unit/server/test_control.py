"""Steering an engine over HTTP."""

import asyncio
import time
from pathlib import Path

import httpx

from _support.live_server import LiveServer, post
from routing_replay.assets import tiny_moe_path

BODY = {"prompt": "<|user|>12+34=<|assistant|>", "temperature": 0, "max_tokens": 8}
LONG = {**BODY, "max_tokens": 480, "ignore_eos": True}


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


def test_paused_engine_computes_nothing_until_it_is_resumed(live: LiveServer):
    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=live.url, timeout=60) as client:
            assert (await client.post("/pause")).status_code == 200
            state = (await client.get("/engine_state")).json()
            assert (state["is_paused"], state["is_sleeping"]) == (True, False)
            sent = asyncio.create_task(client.post("/v1/completions", json=BODY))
            await asyncio.sleep(0.5)
            assert not sent.done()
            assert (await client.post("/resume", json={})).status_code == 200
            assert (await sent).json()["choices"][0]["finish_reason"] == "length"
            wrong = await client.post("/pause", json={"mode": "for ever"})
            assert wrong.json()["error"]["param"] == "mode"

    asyncio.run(scenario())


def test_client_that_leaves_frees_its_kv_blocks(client: httpx.Client):
    before = metric(client, "routing_replay_generation_tokens_total")
    with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()  # the connection closes when it goes
        next(lines)
        post(client, "/pause")
        assert metric(client, "routing_replay_num_requests_running") == 1.0
        assert metric(client, "routing_replay_kv_cache_usage_ratio") > 0.0
    ends = time.monotonic() + 5
    while metric(client, "routing_replay_http_requests_open") > 1.0:  # the other asks for metrics
        assert time.monotonic() < ends
    post(client, "/resume")
    while metric(client, "routing_replay_kv_cache_usage_ratio"):
        assert time.monotonic() < ends
    assert metric(client, "routing_replay_num_requests_running") == 0.0
    assert metric(client, "routing_replay_generation_tokens_total") - before < LONG["max_tokens"]


def test_aborted_request_returns_what_it_has(live: LiveServer):
    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=live.url, timeout=60) as client:
            body = {**LONG, "request_id": "long"}
            sent = asyncio.create_task(client.post("/v1/completions", json=body))
            while not (await client.post("/abort", json={"all": True})).json()["aborted"]:
                await asyncio.sleep(0.01)
            choice = (await sent).json()["choices"][0]
            assert choice["finish_reason"] == "abort"

    asyncio.run(scenario())


def test_new_weights_have_a_version_in_every_answer(client: httpx.Client, tmp_path: Path):
    before = post(client, "/v1/completions", **BODY)
    version = before["weights_version"]
    folder = str(tiny_moe_path())
    assert post(client, "/update_weights", folder=folder) == {"weights_version": version + 1}
    after = client.post("/v1/completions", json=BODY)
    assert after.json()["weights_version"] == version + 1
    assert after.headers["x-weights-version"] == str(version + 1)
    assert after.json()["choices"][0]["text"] == before["choices"][0]["text"]
    assert post(client, "/update_weights", folder=folder, weights_version=7)["weights_version"] == 7
    missing = client.post("/update_weights", json={"folder": str(tmp_path / "none")})
    assert missing.status_code == 400
    assert metric(client, "routing_replay_weights_version") == 7.0


def test_prefix_cache_is_forgotten_on_request(client: httpx.Client):
    def cached() -> int:
        prompt = {**BODY, "prompt": BODY["prompt"] * 5}
        usage = post(client, "/v1/completions", **prompt)["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    post(client, "/reset_prefix_cache")
    assert cached() == 0
    assert cached() >= 16
    post(client, "/reset_prefix_cache")
    assert cached() == 0


def test_engine_sleeps_and_wakes(client: httpx.Client):
    wanted = post(client, "/v1/completions", **BODY)["choices"][0]["text"]
    post(client, "/sleep", level=1)
    assert client.get("/engine_state").json()["is_sleeping"]
    for body in (BODY, {**BODY, "stream": True}):
        refused = client.post("/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_not_ready")
        assert "wake_up" in refused.json()["error"]["message"]
    post(client, "/wake_up")
    assert post(client, "/v1/completions", **BODY)["choices"][0]["text"] == wanted
    again = client.post("/wake_up")
    assert again.status_code == 400


def test_tokenize_and_detokenize_are_each_others_inverse(client: httpx.Client):
    got = post(client, "/tokenize", prompt=BODY["prompt"], return_token_strs=True)
    assert got["count"] == len(got["tokens"]) == len(got["token_strs"])
    assert "".join(got["token_strs"]) == BODY["prompt"]
    assert got["max_model_len"] == 512
    assert post(client, "/detokenize", tokens=got["tokens"]) == {"prompt": BODY["prompt"]}
    chat = post(client, "/tokenize", messages=[{"role": "user", "content": "12+34="}])
    assert chat["tokens"] == got["tokens"]
    assert client.post("/tokenize", json={}).status_code == 400
    assert client.post("/detokenize", json={"tokens": [100_000]}).status_code == 400
