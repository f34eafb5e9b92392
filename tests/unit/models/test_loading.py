"""Weights come from a folder whole, in whatever pieces it is read, or not at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from _support.tiny_models import TinyShape, save_tiny_model
from routing_replay.errors import ConfigError, UnsupportedModelError
from routing_replay.models import (
    Qwen3MoEModel,
    RoutingBuffers,
    SequenceSpan,
    StepInputs,
    load_folder_weights,
    load_model,
    weight_files,
)

SHAPE = TinyShape(num_experts=4, top_k=2, num_layers=2, dense_layers=(0,))
CPU = torch.device("cpu")
Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), SHAPE)


def _load(folder: Path, dtype: torch.dtype = torch.float32, **settings: object) -> Qwen3MoEModel:
    return load_model(folder, dtype=dtype, device=CPU, **settings)  # pyright: ignore[reportArgumentType]


def _copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _check_holds(model: Qwen3MoEModel, stored: dict[str, torch.Tensor]) -> None:
    places = model.checkpoint_places()
    assert places.keys() == stored.keys()
    for name, found in places.items():
        for place in found:
            assert torch.equal(place, stored[name].to(model.dtype).to(place.dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pieces", [(16 << 20, 256 << 20), (64, 100), (24, 1)])
def test_every_tensor_arrives_in_whatever_pieces(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    stored_dtype: torch.dtype,
    pieces: tuple[int, int],
):
    stored = {name: tensor.to(stored_dtype) for name, tensor in _stored(folder).items()}
    target = tmp_path / "m"
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    names = sorted(stored)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: stored[name] for name in held}, target / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(weight_files, "_CHUNK_BYTES", pieces[0])
    monkeypatch.setattr(weight_files, "_RUN_BYTES", pieces[1])
    _check_holds(_load(target, dtype), stored)


def test_update_from_a_folder_replaces_everything_in_place(folder: Path, tmp_path: Path):
    model = _load(folder, torch.bfloat16)
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    other = _copy(folder, tmp_path / "m")
    changed = {name: tensor * 1.25 + 0.5 for name, tensor in _stored(folder).items()}
    save_file(changed, other / "model.safetensors")
    load_folder_weights(model, other)
    _check_holds(model, changed)
    assert addresses == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    load_folder_weights(model, folder)
    _check_holds(model, _stored(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks 1 tensors \(model.norm.weight\)"),
        (lambda t: t.update(more=torch.zeros(2)), r"has 1 unknown ones \(more\)"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"norm.weight has shape \(3,\)"),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(96, 32, dtype=torch.int8)}),
            "lm_head.weight in .* is I8; supported are F64, F32, F16, BF16",
        ),
    ],
)  # fmt: skip
def test_folder_of_another_model_changes_nothing(
    folder: Path, tmp_path: Path, change: Change, message: str
):
    model = _load(folder)
    other = _copy(folder, tmp_path / "m")
    tensors = {name: tensor + 1 for name, tensor in _stored(folder).items()}
    change(tensors)
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=message):
        load_folder_weights(model, other)
    with pytest.raises(UnsupportedModelError, match=message):
        _load(other)
    _check_holds(model, _stored(folder))


def test_folder_with_another_config_is_refused(folder: Path, tmp_path: Path):
    model = _load(folder)
    other = _copy(folder, tmp_path / "m")
    raw = json.loads((other / "config.json").read_text())
    raw["rms_norm_eps"] = 1e-3
    (other / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedModelError, match=r"has rms_norm_eps=0.001, the model 1e-06"):
        load_folder_weights(model, other)
    raw["rms_norm_eps"], raw["eos_token_id"] = 1e-6, 7
    (other / "config.json").write_text(json.dumps(raw))
    load_folder_weights(model, other)


@pytest.mark.parametrize("cut", [1, 1000, -4])
def test_file_that_was_cut_is_refused(folder: Path, tmp_path: Path, cut: int):
    other = _copy(folder, tmp_path / "m")
    path = other / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ConfigError, match=r"cannot be read .*copy the checkpoint again"):
        _load(other)


def test_file_that_is_cut_while_it_is_read_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = _copy(folder, tmp_path / "m")
    path = other / "model.safetensors"
    listed = weight_files.list_tensors(other)
    path.write_bytes(path.read_bytes()[:-4])
    monkeypatch.setattr("routing_replay.models.loading.list_tensors", lambda _: listed)
    with pytest.raises(ConfigError, match="the file ended early"):
        _load(other)


def test_tensor_in_two_files_is_refused(folder: Path, tmp_path: Path):
    other = _copy(folder, tmp_path / "m")
    stored = _stored(folder)
    (other / "model.safetensors").rename(other / "a.safetensors")
    save_file({"model.norm.weight": stored["model.norm.weight"]}, other / "b.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (other / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"model.norm.weight in a.safetensors and in b"):
        _load(other)


def test_dummy_weights_need_no_files_and_follow_their_seed(folder: Path, tmp_path: Path):
    shutil.copy(folder / "config.json", tmp_path)
    first, again, other = (
        _load(tmp_path, torch.bfloat16, load_format="dummy", seed=seed) for seed in (3, 3, 4)
    )
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        assert torch.equal(parameter, parameter.bfloat16().to(parameter.dtype)), name
        is_norm = name.endswith("norm.weight")
        assert torch.equal(parameter, other.get_parameter(name)) == is_norm, name
        if is_norm:
            assert (parameter == 1).all()
        else:
            assert 0.015 < parameter.float().std() < 0.025
    step = StepInputs(
        token_ids=torch.arange(9),
        positions=torch.arange(9),
        slot_mapping=torch.arange(9),
        block_tables=torch.zeros(1, 1, dtype=torch.int64),
        spans=(SequenceSpan(first_row=0, num_tokens=9, context_len=9),),
        num_decodes=0,
        decode_mask=torch.zeros(0, 1, 1, 16, dtype=torch.bool),
    )
    cache = torch.zeros(2, 2, 1, 16, 2, 16, dtype=torch.bfloat16)
    logits = first.compute_logits(first(step, cache, RoutingBuffers()))
    assert logits.isfinite().all()
    assert logits.std() > 0.01


def test_unknown_load_format_is_refused(folder: Path):
    with pytest.raises(ConfigError, match=r"load_format='gguf'; accepted are 'auto', 'dummy'"):
        _load(folder, load_format="gguf")


def test_positions_beyond_the_tables_are_not_computed(folder: Path):
    model = _load(folder, max_position=8)
    assert model.rotary[0].shape == (8, 16)
    assert _load(folder).rotary[0].shape == (256, 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="loads onto a GPU")
def test_gpu_holds_what_the_folder_holds(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weight_files, "_CHUNK_BYTES", 64)
    monkeypatch.setattr(weight_files, "_RUN_BYTES", 100)
    model = load_model(folder, dtype=torch.bfloat16, device=torch.device("cuda"))
    stored = _stored(folder)
    for name, found in model.checkpoint_places().items():
        for place in found:
            assert torch.equal(place.cpu(), stored[name].bfloat16()), name
