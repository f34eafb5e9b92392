"""A server in a process of its own, watched from outside: its address, its processes, their memory, its figures."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Self

_COMMAND = "import sys; from routing_replay.cli import main; sys.exit(main())"
_LISTENING = re.compile(r"listening at (http://\S+?),")
_FIGURE = re.compile(r"^routing_replay_(\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


class ServerProcess:
    """`routing-replay serve` on a free port; `with` starts it, waits until it is ready, and ends it.

    Args:
        words: Further words of the command line.
        model: What it serves.
        threads: Of torch, in each of its processes.
        prefix: Words before the command, such as those of `unshare`.
        ready_s: Longest wait until it is ready, in seconds.
    """

    def __init__(
        self,
        *words: str,
        model: str = "tiny-moe",
        threads: int = 1,
        prefix: Sequence[str] = (),
        ready_s: float = 600.0,
    ) -> None:
        self.words = words
        self._command = [
            *prefix,
            sys.executable,
            "-c",
            _COMMAND,
            "serve",
            model,
            "--port",
            "0",
            *words,
        ]
        self._threads = threads
        self._ready_s = ready_s
        self.log: list[str] = []
        self.url = ""

    def __enter__(self) -> Self:
        """Start and wait."""
        self.process = subprocess.Popen(
            self._command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(self._threads)},
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        until = time.monotonic() + self._ready_s
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise SystemExit("the server did not become ready:\n" + "\n".join(self.log[-30:]))
            time.sleep(0.1)
        return self

    def __exit__(self, *exc_info: object) -> None:
        """End it, and its engine; where a measurement has failed, print what it last said."""
        status = self.process.poll()
        if exc_info[0] is not None:
            print(f"the server's status is {status}, it said:", *self.log[-60:], sep="\n", file=sys.stderr)  # fmt: skip
        if status is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
        self.kill()

    def kill(self) -> None:
        """End it at once."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(5)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def is_ready(self) -> bool:
        """Tell whether it takes requests."""
        if not self.url:
            return False
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    @property
    def engine_pid(self) -> int:
        """The engine's process: of the children the one that holds most memory."""
        children = [int(pid) for task in Path(f"/proc/{self.api_pid}/task").iterdir()
                    for pid in (task / "children").read_text().split()]  # fmt: skip
        if not children:
            raise SystemExit("the server has no engine process")
        return max(children, key=resident_bytes)

    @property
    def api_pid(self) -> int:
        """The process that listens; a prefix replaces itself with it."""
        return self.process.pid

    def figures(self) -> dict[str, float]:
        """Return `/metrics` without labels; figures with several labels are added up."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        found: dict[str, float] = {}
        for name, value in _FIGURE.findall(text):
            found[name] = found.get(name, 0.0) + float(value)
        return found

    def wait_idle(self, seconds: float = 30.0) -> float:
        """Wait until no request is open and no KV block is held; return how long that took.

        Raises:
            SystemExit: It did not come to that in time.
        """
        began = time.monotonic()
        while True:
            now = self.figures()
            held = {
                name: now.get(name, 0.0)
                for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_ratio", "http_requests_open")
            }  # fmt: skip
            held["http_requests_open"] -= 1  # the one that asks
            if not any(held.values()):
                return time.monotonic() - began
            if time.monotonic() - began > seconds:
                raise SystemExit(f"after {seconds} s the server still holds {held}")
            time.sleep(0.02)

    def memory(self) -> dict[str, int]:
        """Return the resident bytes of both processes."""
        return {"api": resident_bytes(self.api_pid), "engine": resident_bytes(self.engine_pid)}

    def cpu_seconds(self) -> float:
        """Return the processor time of both processes so far."""
        return sum(processor_seconds(pid) for pid in (self.api_pid, self.engine_pid))

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process that listens."""
        os.kill(self.api_pid, number)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip())
            del self.log[:-1000]
            if not self.url and (found := _LISTENING.search(line)) is not None:
                self.url = found[1]


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process, all its threads, in the user's mode and the kernel's."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process; 0 for one that has ended."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
