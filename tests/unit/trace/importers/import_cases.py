"""Models, correct arrays of them, and the forms that engines send."""

import base64
import io

import numpy as np

from routing_replay.trace import ModelRouting

SHAPES = {
    "qwen3_30b": ModelRouting(layer_ids=tuple(range(48)), num_layers=48, num_experts=128, top_k=8),
    "deepseek_v3": ModelRouting(
        layer_ids=tuple(range(3, 61)), num_layers=61, num_experts=256, top_k=8
    ),
    "llama4_scout": ModelRouting(
        layer_ids=tuple(range(48)), num_layers=48, num_experts=16, top_k=1
    ),
    "mixtral": ModelRouting(layer_ids=tuple(range(32)), num_layers=32, num_experts=8, top_k=2),
    "qwen3_next": ModelRouting(
        layer_ids=tuple(range(48)), num_layers=48, num_experts=512, top_k=10
    ),
    "small": ModelRouting(layer_ids=(1, 3), num_layers=4, num_experts=4, top_k=1),
}
"""One with K = 1, one with E = 256, one with ids wider than a byte, two with dense layers, one that is tiny."""

MODEL = ModelRouting(layer_ids=(1, 2, 4), num_layers=5, num_experts=32, top_k=4)
"""A model with dense layers at both kinds of place: first and between."""


def random_ids(
    rng: np.random.Generator, rows: int, routing: ModelRouting, *, all_layers: bool = True
) -> np.ndarray:
    """A correct array: distinct experts, in no order, zeros in the slots of dense layers."""
    dtype = np.uint8 if routing.num_experts <= 256 else np.uint16
    keys = rng.random((rows, routing.num_moe_layers, routing.num_experts), dtype=np.float32)
    moe = keys.argpartition(routing.top_k - 1, axis=-1)[..., : routing.top_k].astype(dtype)
    if not all_layers:
        return moe
    ids = np.zeros((rows, routing.num_layers, routing.top_k), dtype)
    ids[:, list(routing.layer_ids)] = moe
    return ids


def random_tokens(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(0, 150_000, count).tolist()


def npy_base64(ids: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, ids)
    return base64.b64encode(buffer.getvalue()).decode()


def sglang_base64(ids: np.ndarray) -> str:
    return base64.b64encode(ids.astype("<i4").tobytes()).decode()


def struct_of(ids: np.ndarray, **more: object) -> dict[str, object]:
    data = base64.b64encode(ids.tobytes()).decode()
    return {"data": data, "shape": list(ids.shape), "dtype": ids.dtype.name, **more}


def nemo_envelope(ids: np.ndarray, dtype: str = "int16") -> str:
    rows, layers, top_k = ids.shape
    data = base64.b64encode(ids.astype(dtype).tobytes()).decode()
    return f"nrlre1:{dtype}:{rows}x{layers}x{top_k}:{data}"
