"""The benchmark of making forms makes what a client would read."""

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks" / "serving"))
import encode_speed

ID_BYTES = {"vllm": 1, "object": 1, "nemo_rl": 1, "sglang": 4}


@pytest.fixture(scope="module")
def forms() -> dict[str, dict[str, object]]:
    rows = asyncio.run(encode_speed.measure(40, 25, 1))
    return {str(row["format"]): row for row in rows}


@pytest.mark.parametrize("name", ID_BYTES)
def test_every_row_is_in_the_text(forms: dict[str, dict[str, object]], name: str):
    num_ids = len(encode_speed.MODEL.layer_ids) * encode_speed.MODEL.top_k
    least = num_ids * ID_BYTES[name] * 4 / 3
    assert least <= float(str(forms[name]["bytes_a_row"])) <= least + 10


def test_a_handle_is_the_smallest_and_raw_the_largest_of_ours(forms: dict[str, dict[str, object]]):
    sizes = {name: float(str(row["bytes_a_row"])) for name, row in forms.items()}
    assert min(sizes, key=sizes.__getitem__) == "trace, store"
    ours = [size for name, size in sizes.items() if name.startswith("trace")]
    assert max(ours) == sizes["trace, raw"]


def test_rows_of_a_response_are_sets_of_experts():
    rows = encode_speed.random_rows(1500)
    assert rows.ids.shape == (1500, 48, 8)
    assert int(rows.ids.max()) < encode_speed.MODEL.num_experts
    assert all(len(set(cell)) == 8 for cell in rows.ids[::97].reshape(-1, 8).tolist())
