"""The models that engine and Transformers are compared on."""

from pathlib import Path

import pytest

from _support.tiny_models import SHAPES, save_tiny_model
from routing_replay.assets import tiny_moe_path


@pytest.fixture(scope="session", params=["tiny-moe", *(shape.label for shape in SHAPES)])
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "tiny-moe":
        return tiny_moe_path()
    shape = next(shape for shape in SHAPES if shape.label == request.param)
    return save_tiny_model(tmp_path_factory.mktemp(shape.label), shape)
