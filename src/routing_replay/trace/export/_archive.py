"""Every field of a trace in containers that need none of this library to read: npz and safetensors."""

import io

import numpy as np

from routing_replay.errors import IntegrationError
from routing_replay.trace._trace import RoutingTrace
from routing_replay.trace.export._format import ExportParameters


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


def encode_npz(trace: RoutingTrace, _parameters: ExportParameters) -> bytes:
    """Write all arrays and facts as a compressed numpy archive."""
    buffer = io.BytesIO()
    facts = {name: np.asarray(value, np.int64) for name, value in _facts(trace).items()}
    np.savez_compressed(buffer, allow_pickle=False, **{**_arrays(trace), **facts})
    return buffer.getvalue()


def encode_safetensors(trace: RoutingTrace, _parameters: ExportParameters) -> bytes:
    """Write all arrays as safetensors, the facts in the metadata.

    Raises:
        IntegrationError: safetensors is not installed.
    """
    try:
        from safetensors.numpy import save
    except ModuleNotFoundError as err:
        raise IntegrationError(
            "the safetensors export needs the package safetensors, which is missing: pip install safetensors"
        ) from err
    metadata = {name: str(value) for name, value in _facts(trace).items()}
    return save(_arrays(trace), metadata={"format": "routing-replay", **metadata})
