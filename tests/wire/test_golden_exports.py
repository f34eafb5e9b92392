"""Exports equal the golden files, which were written from the consumers' contracts without the exporters."""

import io

import numpy as np
import pytest

from routing_replay.trace import EXPORT_FORMATS, ExportParameters, RoutingTrace
from wire import write_golden_exports as golden

OWN = ("npz", "safetensors")
GAPS = {"miles": "arange", "nemo-rl": "native"}


def _trace(*, valid: tuple[bool, ...] = (True,) * 4) -> RoutingTrace:
    return RoutingTrace.from_rows(
        np.array(golden.IDS),
        token_ids=golden.TOKEN_IDS,
        layer_ids=golden.MOE_LAYERS,
        num_layers=golden.NUM_LAYERS,
        num_experts=golden.NUM_EXPERTS,
        valid=valid,
    )


def _parts(name: str, data: bytes) -> object:
    """The content of a file: archives hold time stamps and may be compressed otherwise."""
    if not name.endswith(".npz"):
        return data
    with np.load(io.BytesIO(data)) as arrays:
        return {key: (array.dtype.str, array.tolist()) for key, array in arrays.items()}


def test_every_target_has_a_golden_file():
    names = {item.name + item.suffix for item in EXPORT_FORMATS if item.name not in OWN}
    gaps = {"miles_gap.npy", "nemo-rl_gap.txt"}
    files = {path.name for path in golden.GOLDEN.iterdir()} - {"README.md"}
    assert files == names | gaps == set(golden.contracts())


@pytest.mark.parametrize("name", golden.contracts())
def test_golden_file_is_what_the_contract_says(name: str):
    data = (golden.GOLDEN / name).read_bytes()
    assert _parts(name, data) == _parts(name, golden.contracts()[name])


@pytest.mark.parametrize("item", [item for item in EXPORT_FORMATS if item.name not in OWN])
def test_export_equals_its_golden_file(item: object):
    assert hasattr(item, "encode")
    name = item.name + item.suffix
    parameters = ExportParameters(num_tokens=golden.NUM_TOKENS, num_prompt_tokens=golden.NUM_PROMPT)
    data = item.encode(_trace(), parameters)
    wanted = (golden.GOLDEN / name).read_bytes()
    assert _parts(name, data) == _parts(name, wanted)
    changed = np.array(golden.IDS)
    changed[2, 1, 0] = 5
    twin = RoutingTrace.from_rows(
        changed,
        token_ids=golden.TOKEN_IDS,
        layer_ids=golden.MOE_LAYERS,
        num_layers=golden.NUM_LAYERS,
        num_experts=golden.NUM_EXPERTS,
    )
    assert _parts(name, item.encode(twin, parameters)) != _parts(name, wanted)


@pytest.mark.parametrize("name", GAPS)
def test_export_of_a_gap_equals_its_golden_file(name: str):
    item = next(item for item in EXPORT_FORMATS if item.name == name)
    parameters = ExportParameters(num_tokens=golden.NUM_TOKENS, on_missing=GAPS[name])
    data = item.encode(_trace(valid=(True, False, True, True)), parameters)
    assert data == (golden.GOLDEN / f"{name}_gap{item.suffix}").read_bytes()
