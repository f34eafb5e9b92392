"""`routing-replay doctor`: versions, devices, and which features work here, each by trying it."""

import importlib.metadata
import importlib.util
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

__all__ = ["DoctorOptions", "Finding", "run_doctor"]

_PACKAGES = ("routing-replay", "numpy", "torch", "triton", "transformers", "safetensors", "tokenizers", "zstandard",
             "huggingface-hub", "jinja2", "rich", "tyro", "vllm", "ray")  # fmt: skip


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
    return found


def _devices() -> dict[str, str]:
    if importlib.util.find_spec("torch") is None:
        return {"cpu": platform.processor() or platform.machine()}
    import torch

    devices = {
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
    }
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        devices[f"cuda:{index}"] = (
            f"{name}, compute capability {torch.cuda.get_device_capability(index)}"
        )
    return devices


def _try_codec(codec: str) -> str:
    import numpy as np

    from routing_replay.trace import RoutingTrace, decode_trace, encode_trace

    rng = np.random.default_rng(0)
    ids = rng.random((64, 4, 128)).argsort(-1)[..., :8]
    trace = RoutingTrace.from_rows(
        ids, token_ids=range(64), layer_ids=range(4), num_layers=4, num_experts=128
    )
    data = encode_trace(trace, codec=codec)
    read = decode_trace(data)
    wanted = trace.ids if read.ordered else np.sort(trace.ids, axis=-1)
    if not np.array_equal(read.ids, wanted):
        raise RuntimeError("ids changed on the way")
    return f"{len(data) / 64:.0f} bytes a token of 4 layers, 128 experts, top 8"


def _try_fused_op(device: str) -> str:
    import torch

    from routing_replay.kernels import RoutingMethodType, bf16_moe

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(32, 8, generator=generator).to(device)
    hidden = torch.randn(32, 16, generator=generator).to(device)
    gemm1 = torch.randn(8, 24, 16, generator=generator).to(device)
    gemm2 = torch.randn(8, 16, 12, generator=generator).to(device)
    recorded = torch.full((32, 2), -1, dtype=torch.int16, device=device)
    bf16_moe(
        logits, None, hidden, gemm1, gemm2, 8, 2, None, None, 12, 0, 8,
        routing_method_type=RoutingMethodType.RenormalizeNaive, routing_replay_out=recorded,
    )  # fmt: skip
    expected = logits.sort(dim=-1, descending=True, stable=True).indices[:, :2]
    if not torch.equal(recorded.long(), expected):
        raise RuntimeError("the recorded ids are not the largest logits")
    return f"bf16_moe on {device} records the ids of the largest logits"


def _try_engine() -> str:
    from routing_replay.assets import tiny_moe_path
    from routing_replay.engine import LLM, SamplingParams

    llm = LLM(tiny_moe_path(), enable_return_routed_experts=True)
    output = llm.generate(
        [[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False
    )
    trace = output[0].outputs[0].routing
    again = llm.generate(
        [[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True), replay=trace, use_tqdm=False
    )
    if not trace.ids.tobytes() == again[0].outputs[0].routing.ids.tobytes():
        raise RuntimeError("forced ids were not recorded as given")
    return f"canary passed; {trace.num_rows} rows captured, forced, and captured again"


def _try_replay() -> str:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from routing_replay.assets import tiny_moe_path
    from routing_replay.replay import Packed, attach

    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(tiny_moe_path(), dtype=torch.float32).eval()
    tokens = [5, 6, 7, 8]
    layout = Packed(lengths=(4,))
    with torch.no_grad(), attach(model) as handle:
        with handle.record(layout, token_ids=[tokens]) as recorded:
            native = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        with handle.replay(recorded.traces, layout, on_missing="native"):
            replayed = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
    if not torch.equal(native, replayed):
        raise RuntimeError("a trainer that replays its own routing gave other logits")
    return "a Transformers model recorded its routing and replayed it, bit for bit"


def _try_triton() -> str:
    import torch
    import triton

    if not torch.cuda.is_available():
        raise LookupError(f"triton {triton.__version__} is installed; no CUDA device to run it on")
    from routing_replay.kernels import gather_rows

    cache = torch.tensor([[[1, 2]], [[3, 0]]], dtype=torch.int16, device="cuda")
    rows = torch.empty(1, 2, 2, dtype=torch.int16, device="cuda")
    flags = torch.empty(1, dtype=torch.uint8, device="cuda")
    index = torch.zeros(1, dtype=torch.int64, device="cuda")
    gather_rows(cache, index, rows_out=rows, flags_out=flags, num_reset=1, num_experts=4)
    if rows.flatten().tolist() != [1, 2, 3, 0] or int(flags[0]):
        raise RuntimeError("the gather kernel returned other rows")
    return "the gather kernel runs on cuda:0"


def _finding(feature: str, attempt: Callable[[], str]) -> Finding:
    """Try a feature; whatever it raises is the finding."""
    try:
        return Finding(feature, True, attempt())
    except LookupError as err:
        return Finding(feature, None, str(err))
    except ModuleNotFoundError as err:
        return Finding(feature, None, f"needs {err.name}: pip install 'routing-replay[demo]'")
    except Exception as err:
        return Finding(feature, False, f"{type(err).__name__}: {err}")


def _findings() -> list[Finding]:
    attempts: list[tuple[str, Callable[[], str]]] = [
        (f"trace codec {codec}", lambda codec=codec: _try_codec(codec))
        for codec in ("raw", "packed", "raw+zstd", "packed+zstd")
    ]
    attempts += [
        ("fused MoE op, CPU", lambda: _try_fused_op("cpu")),
        ("engine with capture and forced routing", _try_engine),
        ("replay in Transformers", _try_replay),
        ("Triton kernels", _try_triton),
    ]
    return [_finding(feature, attempt) for feature, attempt in attempts]


def run_doctor(options: DoctorOptions) -> int:
    """Look around and try everything.

    Args:
        options: How to print.

    Returns:
        0 if nothing that could be tried failed, otherwise 1.
    """
    versions, devices = _versions(), _devices()
    findings = _findings()
    code = int(any(finding.works is False for finding in findings))
    if options.json:
        record = {
            "versions": versions,
            "devices": devices,
            "findings": [asdict(f) for f in findings],
        }
        print(json.dumps(record))
        return code
    width = max(map(len, versions))
    for name, value in (*versions.items(), *devices.items()):
        print(f"{name:<{width}}  {value}")
    print()
    marks = {True: "ok  ", False: "FAIL", None: "-   "}
    width = max(len(finding.feature) for finding in findings)
    for finding in findings:
        print(f"{marks[finding.works]}  {finding.feature:<{width}}  {finding.detail}")
    if code:
        print(
            "something failed that should work here; the lines marked FAIL say what",
            file=sys.stderr,
        )
    return code
