"""Sounds in folders, and tiny ClapModels in others."""

from __future__ import annotations

import pytest
import transformers

from benchmarks import checkpoints
from ldm2 import audio
from tests.metrics.oracle import RATE, tone


@pytest.fixture
def folder(tmp_path):
    """folder(name, first, count) writes sounds with these numbers; returns the folder."""
    def write(name: str, first: int, count: int, **options):
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        for number in range(first, first + count):
            audio.write(place / f"sound-{number:02d}.wav", tone(number), RATE, **options)
        return place

    return write


def clap(fusion: bool) -> transformers.ClapModel:
    """A tiny ClapModel; with fusion, with random weights there too."""
    config = checkpoints.clap().config
    if fusion:
        config.audio_config.enable_fusion = True
    return checkpoints.randomise(transformers.ClapModel(config), 11)


@pytest.fixture(scope="session", params=[False, True], ids=["plain", "fusion"])
def clap_folder(request, tmp_path_factory):
    """A repository of a ClapModel, as transformers saves it."""
    place = tmp_path_factory.mktemp("clap")
    clap(request.param).save_pretrained(place)
    checkpoints.roberta_tokenizer().save_pretrained(place)
    extractor = checkpoints.feature_extractor()
    extractor.truncation = "fusion" if request.param else "rand_trunc"
    extractor.save_pretrained(place)
    return place
