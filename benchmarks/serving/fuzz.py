"""Requests made from the OpenAPI document by the thousand, and hostile ones made by hand: 5xx, crashes, hangs.

python benchmarks/serving/fuzz.py --out docs/results/serving_fuzz.json
"""

import argparse
import concurrent.futures
import socket
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

import hostile
import requests as http
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import HypothesisWarning, Unsatisfiable
from hypothesis.strategies import SearchStrategy
from record import arguments, provenance, write
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from server_process import ServerProcess

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
# What a route does to the engine is undone before the next case.
UNDO = {
    "/pause": "/resume",
    "/sleep": "/wake_up",
    "/pause_generation": "/continue_generation",
    "/release_memory_occupation": "/resume_memory_occupation",
}
TIMEOUT_S = 60.0
# The server gives a body 60 s: what waits longer than this hangs.
BODY_TIMEOUT_S = 75.0


class Found:
    """What the answers to one operation's cases were."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.not_as_documented: dict[str, str] = {}

    def row(self, operation: str) -> dict[str, object]:
        """Return the figures of a table's row."""
        server = sum(count for status, count in self.statuses.items() if status.startswith("5"))
        return {
            "operation": operation,
            "cases": self.statuses.total(),
            "accepted": sum(
                count for status, count in self.statuses.items() if status.startswith("2")
            ),
            "refused": sum(
                count for status, count in self.statuses.items() if status.startswith("4")
            ),
            "5xx": server,
            "hung": self.statuses["hung"],
            "not_as_documented": sorted(self.not_as_documented.values())[:5],
        }


def fuzz_document(
    url: str, *, examples: int, number: int = 0, undo: Callable[[str, int], None] | None = None
) -> list[dict[str, object]]:
    """Send `examples` accepted and as many refused cases of each operation of the document.

    Args:
        url: Of the server.
        examples: Cases of each mode and operation.
        number: Seed.
        undo: Called with path and status after each case.

    Returns:
        A row for each operation.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    rows: list[dict[str, object]] = []
    for result in schema.get_all_operations():
        operation = result.ok()
        found = Found()
        for mode in GenerationMode:
            cases = operation.as_strategy(generation_mode=mode)
            _run_cases(operation.path, cases, found, examples=examples, number=number, undo=undo)
        rows.append(found.row(f"{operation.method.upper()} {operation.path}"))
    return rows


def _run_cases(
    path: str,
    strategy: SearchStrategy[schemathesis.Case],
    found: Found,
    *,
    examples: int,
    number: int,
    undo: Callable[[str, int], None] | None,
) -> None:
    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def run(case: schemathesis.Case) -> None:
        try:
            answer = case.call(timeout=TIMEOUT_S)
        except (http.Timeout, TimeoutError):
            found.statuses["hung"] += 1
            return
        found.statuses[str(answer.status_code)] += 1
        try:
            case.validate_response(answer, checks=CHECKS)
        except FailureGroup as group:
            for failure in group.exceptions:
                found.not_as_documented.setdefault(
                    type(failure).__name__, f"{failure} {case.as_curl_command()[:300]}"
                )
        if undo is not None:
            undo(path, answer.status_code)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HypothesisWarning)
        try:
            run()
        except Unsatisfiable:
            return  # an operation without parameters has no case that is refused


def undo_over_http(url: str, folder: str | None = None) -> Callable[[str, int], None]:
    """Return what resumes and wakes an engine; weights that sleep dropped are read again."""

    def undo(path: str, status: int) -> None:
        if path in UNDO and status == 200:
            http.post(f"{url}{UNDO[path]}", json={}, timeout=TIMEOUT_S).raise_for_status()
            if path == "/sleep" and folder is not None:
                http.post(
                    f"{url}/update_weights", json={"folder": folder}, timeout=TIMEOUT_S
                ).raise_for_status()

    return undo


def fuzz_bodies(
    address: tuple[str, int],
    cases: Iterable[hostile.Hostile],
    *,
    timeout_s: float = BODY_TIMEOUT_S,
    at_once: int = 8,
) -> list[dict[str, object]]:
    """Send hostile requests, several at once.

    Returns:
        A row for each kind.
    """
    statuses: dict[str, Counter[str]] = defaultdict(Counter)
    worst: dict[str, list[str]] = defaultdict(list)
    slowest: dict[str, float] = defaultdict(float)

    def run(case: hostile.Hostile) -> None:
        began = time.monotonic()
        status = str(hostile.send(address, case, timeout_s=timeout_s))
        slowest[case.kind] = max(slowest[case.kind], time.monotonic() - began)
        statuses[case.kind][status] += 1
        if status.startswith("5") or status == "hung":
            worst[case.kind].append(f"{case.name}: {status}")

    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, cases))
    return [
        {
            "kind": kind,
            "cases": counted.total(),
            "answers": dict(sorted(counted.items())),
            "5xx": sum(count for status, count in counted.items() if status.startswith("5")),
            "hung": counted["hung"],
            "slowest_s": slowest[kind],
            "worst": worst[kind][:5],
        }
        for kind, counted in statuses.items()
    ]


def flood(address: tuple[str, int], count: int) -> dict[str, object]:
    """Hold many connections that say nothing, and ask for something beside them."""
    began = time.monotonic()
    held = [socket.create_connection(address, timeout=10) for _ in range(count)]
    try:
        good = hostile.post("/v1/completions", b'{"prompt": [3, 4], "max_tokens": 1}')
        status = str(hostile.send(address, hostile.Hostile("flood", "beside", good)))
    finally:
        for one in held:
            one.close()
    return {
        "kind": f"{count} connections that say nothing, one request beside them",
        "cases": 1,
        "answers": {status: 1},
        "5xx": int(status.startswith("5")),
        "hung": int(status == "hung"),
        "slowest_s": time.monotonic() - began,
        "worst": [],
    }


def main() -> None:
    """Fuzz, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=150, help="of each operation and mode")
    options = arguments(parser)
    from routing_replay.assets import tiny_moe_path

    # Short sequences: a case that asks for as many tokens as fit is done soon.
    words = ("--enable-return-routed-experts", "--max-model-len", "64")
    with ServerProcess(*words) as server:
        processes = (server.api_pid, server.engine_pid)
        undo = undo_over_http(server.url, str(tiny_moe_path()))
        document = fuzz_document(server.url, examples=options.examples, undo=undo)
        print(*document, sep="\n", flush=True)
        kinds = [
            hostile.wrong_types(),
            hostile.bad_json(),
            hostile.large_values(),
            hostile.odd_http(),
            hostile.slow(),
        ]
        bodies = fuzz_bodies(server.address, (case for cases in kinds for case in cases))
        bodies.append(flood(server.address, 1000))
        print(*bodies, sep="\n", flush=True)
        crashes = int((server.api_pid, server.engine_pid) != processes or not server.is_ready())
        held = server.wait_idle()
    result = {
        **provenance(options.commit), "model": "tiny-moe, bfloat16", "document": document, "bodies": bodies,
        "crashes": crashes, "seconds_until_idle": held,
    }  # fmt: skip
    write(options.out, result)


if __name__ == "__main__":
    main()
