"""Traces in the shapes that other programs read."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from routing_replay.errors import IntegrationError, TraceMismatchError
from routing_replay.trace._trace import RoutingTrace

__all__ = ["EXPORT_FORMATS", "ExportFormat"]


@dataclass(frozen=True, slots=True)
class ExportFormat:
    """One way to write a trace for others.

    Attributes:
        name: Its name on the command line.
        suffix: Customary end of a file name.
        description: What the bytes are.
        encode: Turns a trace into bytes.
    """

    name: str
    suffix: str
    description: str
    encode: Callable[[RoutingTrace], bytes]


def _arrays(trace: RoutingTrace) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {
        "ids": trace.ids,
        "valid": trace.valid,
        "token_digest": trace.token_digest,
        "layer_ids": np.asarray(trace.layer_ids, np.int64),
        "weights_version": np.asarray(trace.weights_version, np.int64).reshape(-1, 2),
    }
    if trace.weights is not None:
        arrays["weights"] = trace.weights
    return arrays


def _facts(trace: RoutingTrace) -> dict[str, int]:
    return {
        "start": trace.start,
        "num_layers": trace.num_layers,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "ordered": int(trace.ordered),
    }


def _npz(trace: RoutingTrace) -> bytes:
    buffer = io.BytesIO()
    facts = {name: np.asarray(value, np.int64) for name, value in _facts(trace).items()}
    np.savez_compressed(buffer, allow_pickle=False, **{**_arrays(trace), **facts})
    return buffer.getvalue()


def _safetensors(trace: RoutingTrace) -> bytes:
    try:
        from safetensors.numpy import save
    except ModuleNotFoundError as err:
        raise IntegrationError(
            "the safetensors export needs the package safetensors, which is missing: pip install safetensors"
        ) from err
    metadata = {name: str(value) for name, value in _facts(trace).items()}
    return save(_arrays(trace), metadata={"format": "routing-replay", **metadata})


def _vllm(trace: RoutingTrace) -> bytes:
    """The `routed_experts` field: base64 of an `.npy` of `[rows, decoder layers, K]`, dense layers holding arange(K)."""
    if trace.start != 0 or not trace.is_complete:
        missing = np.flatnonzero(~trace.valid)
        first = 0 if trace.start else int(missing[0])
        raise TraceMismatchError(
            f"the row of token index {first} is missing, and vLLM's routed_experts cannot say so: a reader would take "
            "its filler for experts; merge the missing rows first"
        )
    filler = np.arange(trace.top_k, dtype=trace.ids.dtype)
    every = np.broadcast_to(filler, (trace.num_rows, trace.num_layers, trace.top_k)).copy()
    every[:, list(trace.layer_ids)] = trace.ids
    buffer = io.BytesIO()
    np.save(buffer, every, allow_pickle=False)
    return base64.b64encode(buffer.getvalue())


EXPORT_FORMATS = (
    ExportFormat("npz", ".npz", "numpy archive of all arrays and facts", _npz),
    ExportFormat("safetensors", ".safetensors", "safetensors, facts in its metadata", _safetensors),
    ExportFormat(
        "vllm",
        ".b64",
        "vLLM's routed_experts: base64 of an .npy of all decoder layers, dense ones arange(K)",
        _vllm,
    ),
)
"""Every format that `routing-replay export` knows."""
