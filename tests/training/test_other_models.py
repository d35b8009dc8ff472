"""Trainings of models that are told what to do in other ways than AudioLDM2: by a FiLM vector, and by what is said."""

import numpy as np
import pytest
import soundfile
import torch

import ldm2
from benchmarks import checkpoints
from ldm2.cli.commands import main
from ldm2.training.options import DISTILL, LORA
from tests import authors
from tests.training.runs import losses


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The words of a command line that name a model of each kind, with random weights."""
    folder = tmp_path_factory.mktemp("models")
    file = authors.save(authors.whole_state(authors.modules("film")), folder / "film.pth")
    tokenizers = authors.save_tokenizers(folder / "tokenizers")
    return {"film": ["--model", str(file), "--tokenizers", str(tokenizers)],
            "speech": ["--model", str(checkpoints.save_speech(folder / "speech"))]}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two clips with captions, and what is said in them."""
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    rows = ["file_name,text,transcription"]
    for number in range(2):
        soundfile.write(folder / f"{number}.wav", 0.1 * rng.standard_normal(8_000), 16_000)
        rows.append(f"{number}.wav,a woman speaks,hello")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize(("kind", "task"), [("film", LORA), ("speech", LORA), ("speech", DISTILL)])
def test_the_loss_falls_and_the_lora_fits(models, clips, tmp_path, kind, task):
    teacher = ["--runs", "2", "--evaluations", "2", "--teacher-steps", "2", "--own-states", "0.5"]
    out = tmp_path / "out"
    assert main(["train", task, str(clips), "-o", str(out), *models[kind], "--device", "cpu", "-q", "--seconds", "0.3",
                 "--steps", "12", "--batch-size", "2", "--warmup", "1", "--decay-from", "1", "--rate", "0.01",
                 *(teacher if task == DISTILL else [])]) == 0
    found = losses(out)
    assert len(found) == 12 and np.mean(found[-4:]) < np.mean(found[:4])
    named = dict(zip(("model", "tokenizers"), models[kind][1::2]))
    pipe = ldm2.load(named.pop("model"), device="cpu", **named)
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    before = layer.weight.clone()
    pipe.load_lora(out)
    assert not torch.equal(layer.weight, before)
