"""Weights travel from a trainer's process into a decoder's, packed, and arrive under the right names."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from _support.tiny_models import TinyShape, save_tiny_model
from routing_replay.errors import ConfigError
from routing_replay.models import WeightInfo, broadcast, describe_weights

SHAPE = TinyShape(num_experts=4, top_k=2, num_layers=2, dense_layers=(0,))


def test_broadcast_weights_replace_those_of_another_process(tmp_path: Path):
    folder = save_tiny_model(tmp_path / "model", SHAPE)
    peers = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("broadcast_peer.py")), str(rank), str(folder), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        outputs = [peer.communicate(timeout=100)[0] for peer in peers]
    finally:
        for peer in peers:
            peer.kill()
    assert [peer.returncode for peer in peers] == [0, 0], outputs
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    stored = load_file(folder / "model.safetensors")
    got = load_file(tmp_path / "got.safetensors")
    assert got.keys() == stored.keys()
    for index, (name, tensor) in enumerate(sorted(stored.items())):
        expected = (tensor * 1.5 - 0.25).to(dtypes[index % 3]).bfloat16()
        assert torch.equal(got[name].bfloat16(), expected), name
        assert torch.equal(got[name], expected.to(got[name].dtype)), name


@pytest.mark.parametrize("limit", [1, 100, 160, 10**6])
def test_messages_are_alike_on_both_sides(monkeypatch: pytest.MonkeyPatch, limit: int):
    monkeypatch.setattr(broadcast, "_BUCKET_BYTES", limit)
    tensors = [
        ("a", torch.zeros(3, dtype=torch.bfloat16)),
        ("b", torch.zeros(0, 4)),
        ("c", torch.zeros(5, 7, dtype=torch.float64)),
        ("d", torch.zeros(())),
        ("e", torch.zeros(33, dtype=torch.float16)),
    ]
    infos = describe_weights(tensors)
    sent = [
        ([(item[0], first) for item, first in bucket], size)
        for bucket, size in broadcast._buckets(tensors, lambda item: item[1].nbytes)  # pyright: ignore[reportPrivateUsage]
    ]
    received = [
        ([(info.name, first) for info, first in bucket], size)
        for bucket, size in broadcast._buckets(infos, lambda info: info.num_bytes)  # pyright: ignore[reportPrivateUsage]
    ]
    assert sent == received
    assert [name for bucket, _ in sent for name, _ in bucket] == list("abcde")
    assert all(first % 16 == 0 for bucket, _ in sent for _, first in bucket)
    assert all(size <= limit or len(bucket) == 1 for bucket, size in sent)


def test_other_dtypes_are_refused():
    with pytest.raises(ConfigError, match="x is 'int8'; accepted are float64, float32"):
        describe_weights([("x", torch.zeros(2, dtype=torch.int8))])
    assert WeightInfo(name="x", dtype="bfloat16", shape=(2, 3)).num_bytes == 12
