"""`routing-replay doctor`: versions, devices, and which features work here, each by trying it."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

from routing_replay.cli.attempts import ATTEMPTS, NothingToTryError
from routing_replay.cli.provenance import checkout_commit
from routing_replay.errors import IntegrationError

__all__ = ["DoctorOptions", "Finding", "run_doctor"]

_PACKAGES = ("routing-replay", "numpy", "torch", "triton", "transformers", "safetensors", "tokenizers", "zstandard",
             "huggingface-hub", "jinja2", "rich", "tyro", "vllm", "ray")  # fmt: skip
_MARKS = {True: "ok  ", False: "FAIL", None: "-   "}


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorOptions:
    """Show versions, devices, and which features work here; each is really tried.

    Example: routing-replay doctor --json
    """

    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of trying a feature.

    Attributes:
        feature: What was tried.
        works: Whether it did; None where this machine has nothing to try it on.
        detail: What was seen, or why it did not work and what to do.
    """

    feature: str
    works: bool | None
    detail: str


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    commit = checkout_commit()
    return found if commit is None else {**found, "commit": commit}


def _devices() -> dict[str, str]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = f"{platform.machine()}, {usable} usable cores"
    if importlib.util.find_spec("torch") is None:
        return {"cpu": cpu}
    import torch

    has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    devices = {
        "cpu": f"{cpu}, {torch.get_num_threads()} torch threads, {torch.backends.cpu.get_cpu_capability()}, "
        f"{'fast' if has_bfloat16 else 'no fast'} bfloat16",
    }
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (
            f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB"
        )
    return devices


def _finding(feature: str, attempt: Callable[[], str]) -> Finding:
    """Try a feature; whatever it raises is the finding."""
    try:
        return Finding(feature, True, attempt())
    except (NothingToTryError, IntegrationError) as err:
        return Finding(feature, None, str(err))
    except ModuleNotFoundError as err:
        extra = "triton" if err.name == "triton" else "'routing-replay[demo]'"
        return Finding(feature, None, f"needs {err.name}, which is missing: pip install {extra}")
    except Exception as err:
        return Finding(feature, False, f"{type(err).__name__}: {err}")


def run_doctor(options: DoctorOptions) -> int:
    """Look around and try everything.

    Args:
        options: How to print.

    Returns:
        0 if nothing that could be tried failed, otherwise 1.
    """
    versions, devices = _versions(), _devices()
    findings = [_finding(feature, attempt) for feature, attempt in ATTEMPTS]
    code = int(any(finding.works is False for finding in findings))
    if options.json:
        record = {
            "versions": versions,
            "devices": devices,
            "findings": [asdict(finding) for finding in findings],
        }
        print(json.dumps(record))
        return code
    width = max(map(len, versions))
    for name, value in (*versions.items(), *devices.items()):
        print(f"{name:<{width}}  {value}")
    print()
    width = max(len(finding.feature) for finding in findings)
    for finding in findings:
        print(f"{_MARKS[finding.works]}  {finding.feature:<{width}}  {finding.detail}")
    if code:
        print("a line marked FAIL is something that should work here", file=sys.stderr)
    return code
