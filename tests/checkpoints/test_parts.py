"""One form of a checkpoint, whatever holds it."""

from __future__ import annotations

import json

import pytest
import torch

from ldm2.checkpoints import build, random_models
from ldm2.checkpoints.convert import convert
from ldm2.checkpoints.hub import BUNDLED
from ldm2.checkpoints.reading import read
from tests import authors

pytestmark = pytest.mark.fast

MODELS = ("unet", "vae", "vocoder")


def shapes(checkpoint, name: str) -> dict:
    return {key: tuple(tensor.shape) for key, tensor in checkpoint[name].tensors.items()}


def test_a_file_and_the_folder_made_of_it_are_the_same_parts(tmp_path):
    path = authors.save(authors.golden_state("film"), tmp_path / "film.pth")
    file, folder = read(path), read(convert(path, tmp_path / "film").folder)
    for name in MODELS:
        assert shapes(file, name) == shapes(folder, name)
        assert build.config_of(file[name], name) == build.config_of(folder[name], name)
    assert file["scheduler"].fields == folder["scheduler"].fields


def test_a_random_model_has_the_parts_of_the_folder_whose_fields_it_takes():
    folder, drawn = read(BUNDLED / "tiny"), random_models.read("tiny")
    weighty = {name for name, part in folder.items() if part.tensors}
    assert weighty | {"scheduler"} == set(drawn)
    for name in MODELS:
        assert shapes(folder, name) == shapes(drawn, name)


def test_a_part_that_a_model_needs_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "AudioLDM2Pipeline"}))
    with pytest.raises(ValueError, match="holds no unet"):
        build.pipeline(lambda: read(tmp_path), device=torch.device("cpu"), dtype=torch.float32, origin={"model": "x"})
