"""Servers with the embedded model: one for all tests that leave it as it is, and one for each module that steers it."""

from collections.abc import Iterator

import httpx
import pytest

from _support.live_server import LiveServer, live_server, tiny_moe_engine
from routing_replay.server import ServingConfig


@pytest.fixture(scope="session")
def tiny_moe_server() -> Iterator[LiveServer]:
    config = ServingConfig(port=0, served_model_names=("tiny-moe", "alias"))
    with live_server(tiny_moe_engine(), config) as live:
        yield live


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    config = ServingConfig(port=0, served_model_names=("tiny-moe",))
    with live_server(tiny_moe_engine(num_kv_blocks=64), config) as live:
        yield live


@pytest.fixture
def client(live: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=60) as client:
        yield client
