"""Full-size random checkpoints beside diffusers: `python -m pytest -m slow`; 15 GB of memory, 12 GB of disk."""

from __future__ import annotations

import pytest
import torch

import ldm2
from benchmarks import checkpoints, full_size
from tests.helpers import relative

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("size", full_size.SIZES)
def test_full_size_audio_is_that_of_diffusers(tmp_path, size):
    folder = full_size.save(tmp_path / size, size)
    theirs = checkpoints.diffusers_pipeline(folder)(
        "a dog barking in the rain", negative_prompt="low quality", num_inference_steps=3, audio_length_in_s=2.56,
        generator=torch.Generator().manual_seed(0),
    ).audios
    result = ldm2.load(folder, reference="diffusers").generate(
        "a dog barking in the rain", "low quality", steps=3, seconds=2.56, seed=0
    )
    assert relative(result.waveforms, theirs) < 1e-2
