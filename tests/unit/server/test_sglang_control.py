"""SGLang's clients steer the server by the names that they know."""

import threading
import time

import httpx
import pytest

from _support.live_server import LiveServer, post
from routing_replay.assets import tiny_moe_path

PROMPT = "<|user|>12+34=<|assistant|>"
SHORT = {"text": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 8}}


def _running(live: LiveServer, rid: str) -> tuple[threading.Thread, list[dict]]:
    """Start a request that takes long, and wait until it has begun."""
    answers: list[dict] = []
    long = {"temperature": 0, "max_new_tokens": 480, "ignore_eos": True}

    def ask() -> None:
        body = {"text": PROMPT, "rid": rid, "sampling_params": long}
        answers.append(httpx.post(f"{live.url}/generate", json=body, timeout=60).json())

    thread = threading.Thread(target=ask)
    thread.start()
    deadline = time.monotonic() + 30
    while httpx.get(f"{live.url}/metrics").text.find("routing_replay_num_requests_running 1") < 0:
        assert time.monotonic() < deadline, "the request does not run"
        time.sleep(0.01)
    return thread, answers


@pytest.mark.parametrize("fields", [{"rid": "mine"}, {"rid": "", "abort_all": True}])
def test_a_request_is_ended_by_its_rid_or_with_all(
    live: LiveServer, client: httpx.Client, fields: dict[str, object]
):
    thread, answers = _running(live, "mine")
    assert post(client, "/abort_request", rid="another") == {
        "success": True,
        "message": "0 ended",
        "num_paused_requests": 0,
    }
    assert post(client, "/abort_request", **fields)["message"] == "1 ended"
    thread.join(30)
    assert answers[0]["meta_info"]["finish_reason"]["type"] == "abort"
    assert answers[0]["meta_info"]["completion_tokens"] < 480


@pytest.mark.parametrize("fields", [{}, {"rid": "a", "abort_all": True}])
def test_one_of_rid_and_all_is_named(client: httpx.Client, fields: dict[str, object]):
    refused = client.post("/abort_request", json=fields)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "rid")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_cache_is_flushed(client: httpx.Client, method: str):
    body = {**SHORT, "text": PROMPT * 5}

    def cached() -> int:
        return post(client, "/generate", **body)["meta_info"]["cached_tokens"]

    assert client.request(method, "/flush_cache").status_code == 200
    assert cached() == 0
    assert cached() >= 16
    assert client.request(method, "/flush_cache").status_code == 200
    assert cached() == 0


@pytest.mark.parametrize(("mode", "ends"), [("abort", True), ("in_place", False), (None, True)])
def test_pause_ends_requests_or_keeps_them(
    live: LiveServer, client: httpx.Client, mode: str | None, *, ends: bool
):
    thread, answers = _running(live, "paused")
    post(client, "/pause_generation", **({} if mode is None else {"mode": mode}))
    assert client.get("/engine_state").json()["is_paused"]
    post(client, "/continue_generation")
    thread.join(60)
    assert (answers[0]["meta_info"]["finish_reason"]["type"] == "abort") is ends
    refused = client.post("/pause_generation", json={"mode": "retract"})
    assert refused.status_code == 400
    assert "in_place" in refused.json()["error"]["message"]


def test_weights_come_from_a_folder(client: httpx.Client):
    wanted = post(client, "/generate", **SHORT)
    path = str(tiny_moe_path())
    done = post(client, "/update_weights_from_disk", model_path=path, weight_version="41")
    assert (done["success"], done["message"]) == (True, "weights have version 41")
    assert client.get("/model_info").json()["weight_version"] == "41"
    done = post(client, "/update_weights_from_disk", model_path=path, abort_all_requests=True)
    assert done["message"] == "weights have version 42"
    again = post(client, "/generate", **SHORT)
    assert again["output_ids"] == wanted["output_ids"]
    assert again["meta_info"]["weight_version"] == "42"
    refused = client.post("/update_weights_from_disk", json={"model_path": "/nowhere"})
    assert refused.status_code == 400
    refused = client.post(
        "/update_weights_from_disk", json={"model_path": path, "weight_version": "v1"}
    )
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "weight_version")


def test_memory_is_released_and_taken_again(client: httpx.Client):
    wanted = post(client, "/generate", **SHORT)["output_ids"]
    refused = client.post("/release_memory_occupation", json={"tags": ["kv_cache"]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tags")
    post(client, "/release_memory_occupation", tags=["kv_cache", "weights"])
    assert client.get("/engine_state").json()["is_sleeping"]
    refused = client.post("/generate", json=SHORT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_not_ready")
    post(client, "/resume_memory_occupation")
    assert post(client, "/generate", **SHORT)["output_ids"] == wanted
