"""What `routing-replay doctor` tries: each attempt runs a feature and says what it saw, or raises."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from routing_replay.errors import RoutingReplayError
from routing_replay.trace import CODEC_NAMES

__all__ = ["ATTEMPTS", "AttemptError", "NothingToTryError"]


class NothingToTryError(RoutingReplayError):
    """This machine has nothing to try a feature on."""


class AttemptError(RoutingReplayError):
    """A feature ran and did something else than it should."""


def _require(holds: bool, failure: str) -> None:
    if not holds:
        raise AttemptError(failure)


def _codec(codec: str) -> str:
    import numpy as np

    from routing_replay.trace import RoutingTrace, decode_trace, encode_trace

    rng = np.random.default_rng(0)
    ids = rng.random((64, 4, 128)).argsort(-1)[..., :8]
    trace = RoutingTrace.from_rows(
        ids, token_ids=range(65), layer_ids=range(4), num_layers=4, num_experts=128
    )
    data = encode_trace(trace, codec=codec)
    read = decode_trace(data)
    wanted = trace.ids if read.ordered else np.sort(trace.ids, axis=-1)
    _require(np.array_equal(read.ids, wanted), "ids changed on the way")
    return f"{len(data) / 64:.0f} bytes a token of 4 layers, 128 experts, top 8"


def _store() -> str:
    import numpy as np

    from routing_replay.trace import RoutingTrace, TraceStoreReader, TraceStoreWriter

    ids = np.arange(24).reshape(3, 2, 4)
    trace = RoutingTrace.from_rows(
        ids, token_ids=range(4), layer_ids=(1, 2), num_layers=3, num_experts=32
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "traces.rrs"
        with TraceStoreWriter(path) as writer:
            writer.append("a", trace)
            with TraceStoreReader(path) as reader:
                same = reader["a"].ids.tobytes() == trace.ids.tobytes()
    _require(same, "another trace was read than was written")
    return "written, locked, and read while open"


def _fused_op(device: str) -> str:
    import torch

    from routing_replay.kernels import RoutingMethodType, bf16_moe

    if device == "cuda" and not torch.cuda.is_available():
        raise NothingToTryError("torch sees no CUDA device")
    generator = torch.Generator().manual_seed(0)
    sizes = ((32, 8), (32, 16), (8, 24, 16), (8, 16, 12))
    logits, hidden, gemm1, gemm2 = (
        torch.randn(size, generator=generator).to(device) for size in sizes
    )
    routing = {"routing_method_type": RoutingMethodType.RenormalizeNaive}

    def run(**replay: torch.Tensor) -> torch.Tensor:
        return bf16_moe(logits, None, hidden, gemm1, gemm2, 8, 2, None, None, 12, 0, 8, **routing, **replay)  # fmt: skip  # pyright: ignore[reportArgumentType, reportReturnType]

    recorded = torch.full((32, 2), -1, dtype=torch.int16, device=device)
    output = run(routing_replay_out=recorded)
    picked = logits.sort(dim=-1, descending=True, stable=True).indices[:, :2]
    _require(
        torch.equal(recorded.long(), picked), "the recorded ids are not those of the largest logits"
    )
    weights = logits.softmax(-1).gather(1, picked)
    gate, up = torch.einsum("th,eih->tei", hidden, gemm1).chunk(2, dim=-1)
    every = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(gate) * up, gemm2)
    expected = (every.gather(1, picked[..., None].expand(-1, -1, 16)) * weights[..., None]).sum(1)
    expected = expected / weights.sum(1, keepdim=True)
    error = float((output - expected).abs().max())
    _require(error < 1e-3, f"the output is off by {error:.1e} from plain torch")
    forced = picked.flip(0).to(torch.int16).contiguous()
    run(routing_replay_in=forced, routing_replay_out=recorded)
    _require(torch.equal(recorded, forced), "forced ids were not those in use")
    return f"bf16_moe on {device}: records, forces, and equals plain torch within {error:.0e}"


def _engine() -> str:
    from routing_replay.assets import tiny_moe_path
    from routing_replay.engine import LLM, SamplingParams

    llm = LLM(tiny_moe_path(), enable_return_routed_experts=True)
    params = SamplingParams(max_tokens=4, ignore_eos=True, seed=0)
    trace = llm.generate([[1, 2, 3]], params, use_tqdm=False)[0].outputs[0].routing
    again = llm.generate([[1, 2, 3]], params, replay=trace, use_tqdm=False)[0].outputs[0].routing
    _require(trace.num_rows == 6, f"{trace.num_rows} rows were captured of 6")
    _require(trace.ids.tobytes() == again.ids.tobytes(), "forced ids were not recorded as given")
    return f"canary passed; {trace.num_rows} rows captured, forced, and captured again"


def _replay() -> str:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from routing_replay.assets import tiny_moe_path
    from routing_replay.replay import Packed, attach

    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(tiny_moe_path(), dtype=torch.float32).eval()
    tokens = [5, 6, 7, 8]
    layout = Packed(lengths=(4,))
    inputs = torch.tensor([tokens])
    with torch.no_grad(), attach(model) as handle:
        with handle.record(layout, token_ids=[tokens]) as recorded:
            native = model(input_ids=inputs, use_cache=False).logits
        with handle.replay(recorded.traces, layout, on_missing="native"):
            replayed = model(input_ids=inputs, use_cache=False).logits
        coverage = handle.stats().coverage
    _require(coverage == 1.0, f"coverage {coverage:.2%}")
    _require(torch.equal(native, replayed), "replaying its own routing changed the logits")
    return "a Transformers model recorded its routing and replayed it, bit for bit"


def _triton() -> str:
    import torch
    import triton

    if not torch.cuda.is_available():
        raise NothingToTryError(
            f"triton {triton.__version__} is installed; torch sees no CUDA device to run it on"
        )
    from routing_replay.kernels import gather_rows

    written = torch.tensor([[[1, 2], [4, 5]], [[3, 0], [6, 7]]], dtype=torch.int16, device="cuda")
    cache, index = written.clone(), torch.tensor([1, 0], device="cuda")
    rows = torch.empty(2, 2, 2, dtype=torch.int16, device="cuda")
    flags = torch.empty(2, dtype=torch.uint8, device="cuda")
    gather_rows(cache, index, rows_out=rows, flags_out=flags, num_reset=2, num_experts=8)
    _require(
        torch.equal(rows, written.transpose(0, 1)[index]), "the gather kernel returned other rows"
    )
    _require(not bool(flags.any()), "the gather kernel flagged a good row")
    _require(bool((cache == -1).all()), "the gather kernel did not reset its rows")
    return "the gather kernel runs on cuda:0"


ATTEMPTS: tuple[tuple[str, Callable[[], str]], ...] = (
    *((f"trace codec {codec}", partial(_codec, codec)) for codec in CODEC_NAMES),
    ("trace store", _store),
    ("fused MoE op, CPU", partial(_fused_op, "cpu")),
    ("fused MoE op, CUDA", partial(_fused_op, "cuda")),
    ("engine with capture and forced routing", _engine),
    ("replay in Transformers", _replay),
    ("Triton kernels", _triton),
)
"""Every feature by name, and what tries it."""
