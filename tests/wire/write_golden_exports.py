"""Write the golden exports that are missing, from the consumers' contracts alone: nothing here calls an exporter.

PYTHONPATH=tests python tests/wire/write_golden_exports.py
"""

import base64
import io
import json
import struct
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "export"

# Five tokens, of which the first two are the prompt; four decoder layers, of which 1 and 3 have routers; 300 experts,
# two of them for each token.
NUM_PROMPT, NUM_TOKENS, NUM_LAYERS, TOP_K, NUM_EXPERTS = 2, 5, 4, 2, 300
TOKEN_IDS = (11, 12, 13, 14, 15)
MOE_LAYERS = (1, 3)
IDS = (
    ((299, 0), (4, 7)),
    ((1, 256), (255, 3)),
    ((40, 41), (0, 1)),
    ((128, 127), (298, 17)),
)
DENSE = (0, 1)
ALL_LAYERS = [[list(DENSE), list(row[0]), list(DENSE), list(row[1])] for row in IDS]


def _flat(value: object) -> list[int]:
    return [value] if isinstance(value, int) else [item for part in value for item in _flat(part)]


def _packed(value: object, code: str) -> str:
    numbers = _flat(value)
    return base64.b64encode(struct.pack(f"<{len(numbers)}{code}", *numbers)).decode()


def _npy(value: object, dtype: str) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(value, dtype=dtype))
    return buffer.getvalue()


def _npz(arrays: dict[str, object]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.array(value, dtype="<i8") for name, value in arrays.items()})
    return buffer.getvalue()


def contracts() -> dict[str, bytes]:
    """The bytes of every target for the trace above."""
    last = ALL_LAYERS[-1]
    nemo = [*(list(row) for row in IDS), [DENSE, DENSE]]
    gap = [[-1, -1]] * 2
    files: dict[str, bytes] = {
        "verl.npy": _npy(ALL_LAYERS, "<i2"),
        "slime.npy": _npy(ALL_LAYERS, "<i4"),
        "miles.npy": _npy(ALL_LAYERS, "<i4"),
        "miles_gap.npy": _npy([ALL_LAYERS[0], [[-1, -1]] * 4, *ALL_LAYERS[2:]], "<i4"),
        "skyrl.npy": _npy(ALL_LAYERS, "<i2"),
        "ms-swift.npy": _npy(ALL_LAYERS, "<i8"),
        "areal.npy": _npy([_flat(row) for row in ALL_LAYERS], "<i4"),
        "nemo-rl.txt": f"nrlre1:int16:5x2x2:{_packed(nemo, 'h')}".encode(),
        "nemo-rl_gap.txt": f"nrlre1:int16:5x2x2:{_packed([nemo[0], gap, *nemo[2:]], 'h')}".encode(),
        "megatron.npz": _npz(
            {"2": [*(row[0] for row in IDS), DENSE], "4": [*(row[1] for row in IDS), DENSE]}
        ),
        "vllm.b64": base64.b64encode(_npy(ALL_LAYERS, "<u2")),
    }
    documents: dict[str, object] = {
        "prime-rl.json": {
            "data": _packed([*ALL_LAYERS, last], "H"),
            "shape": [5, 4, 2],
            "dtype": "uint16",
        },
        "vllm-generate.json": {
            "routed_experts": {
                "data": _packed(ALL_LAYERS, "H"),
                "shape": [4, 4, 2],
                "start": 0,
                "dtype": "uint16",
            }
        },
        "vllm-split.json": {
            "prompt_routed_experts": ALL_LAYERS[:NUM_PROMPT],
            "routed_experts": ALL_LAYERS[NUM_PROMPT:],
        },
        "sglang.json": {"meta_info": {"routed_experts": _packed(ALL_LAYERS, "i")}},
        "sglang-openai.json": {"sglext": {"routed_experts": _packed(ALL_LAYERS, "i")}},
    }
    return {**files, **{name: json.dumps(value).encode() for name, value in documents.items()}}


def main() -> None:
    """Write what is not there yet."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, data in contracts().items():
        if not (GOLDEN / name).exists():
            (GOLDEN / name).write_bytes(data)


if __name__ == "__main__":
    main()
