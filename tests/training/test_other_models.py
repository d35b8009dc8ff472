"""Trainings beyond the UNet of a sound model: FiLM vectors, speech, and the projection before GPT-2."""

import numpy as np
import pytest
import soundfile
import torch

import ldm2
from benchmarks import checkpoints
from ldm2.checkpoints import lora_files
from ldm2.cli.commands import main
from ldm2.training import outcome
from ldm2.training.encoding import Store, basis_of, encode_sides, join_rows
from ldm2.training.options import DISTILL, LORA, Training
from ldm2.training.tuning import Learner
from ldm2.training.words import Words, encode_words
from ldm2.weights import read_safetensors
from tests import authors
from tests.helpers import draw
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


def test_the_projection_before_gpt2_learns_too(clips, tmp_path):
    out = tmp_path / "out"
    assert main(["train", "lora", str(clips), "-o", str(out), "--model", "tiny", "-q", "--seconds", "0.32",
                 "--steps", "3", "--batch-size", "2", "--warmup", "1", "--rate", "0.05", "--rank", "2", "--drop", "0",
                 "--layers", "attention,projection"]) == 0
    layers = lora_files.read(out / "pytorch_lora_weights.safetensors").layers
    trained = {name: layer for name, layer in layers.items() if name.startswith("projection_model.")}
    assert set(trained) == {"projection_model.projection", "projection_model.projection_1"}
    assert all(layer.up.abs().max() > 0 for layer in trained.values()) and len(layers) > len(trained)
    pipe = ldm2.load("tiny", device="cpu")
    before = pipe.encode("a woman speaks")
    pipe.load_lora(out)
    changed = pipe.encode("a woman speaks")
    assert (changed.contexts[0] - before.contexts[0]).abs().max() > 1e-3
    assert torch.equal(changed.contexts[1], before.contexts[1])
    pipe.unload_lora()
    assert torch.equal(pipe.encode("a woman speaks").contexts[0], before.contexts[0])


@torch.no_grad()
def test_peft_takes_the_projections_part_of_the_file(tmp_path):
    peft, diffusers = pytest.importorskip("peft"), pytest.importorskip("diffusers")
    pipe = ldm2.load("tiny", device="cpu")
    options = Training(LORA, layers=("attention", "projection"), rank=2, alpha=3.0).resolved()
    trained = outcome.prepare(pipe.unet, options, pipe.text)
    for number, parameter in enumerate(trained.module.parameters()):
        parameter += 0.1 * draw(*parameter.shape, seed=number)
    tensors = read_safetensors(trained.adapter().save(tmp_path / "pytorch_lora_weights.safetensors"))
    mine, prefix = pipe.text.projection, "projection_model."
    theirs = diffusers.AudioLDM2ProjectionModel(mine.config.clap_dim, mine.config.text_dim, mine.config.width)
    trained.loras["projection_model"].remove()
    theirs.load_state_dict(mine.state_dict())
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=3.0, target_modules=["projection", "projection_1"]),
                                 theirs)
    peft.set_peft_model_state_dict(theirs, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()
                                            if name.startswith(prefix)})
    pipe.load_lora(tmp_path)
    clap, states = draw(2, mine.config.clap_dim), draw(2, 5, mine.config.text_dim)
    mask = torch.ones(2, 5, dtype=torch.bool)
    found = theirs(clap[:, None], states, torch.ones(2, 1), mask).hidden_states
    torch.testing.assert_close(mine(clap, states, mask)[0], found, rtol=1e-4, atol=1e-4)
    assert any(name.startswith("unet.") for name in tensors)


def test_vectors_made_anew_are_those_of_the_text_encoder_and_take_gradients(tmp_path):
    pipe, store = ldm2.load("tiny", device="cpu"), Store(tmp_path)
    texts = [("a siren", None), ("a long low tone, quiet", None)]
    keys = [side[0] for side in encode_sides(pipe, texts, basis_of(pipe, "tiny"), store, lambda *_: None).values()]
    encode_words(pipe, "tiny", texts, store, lambda *_: None)
    learner = Learner(pipe, Training(LORA, layers="projection", rank=2).resolved(), torch.float32)
    learner.words = Words(pipe, store)
    trained = learner.prepare()
    assert set(trained.loras) == {"projection_model"}
    stored = join_rows(store, [*keys, keys[0]])
    found = learner.words(stored, (*keys, "unconditional"))
    torch.testing.assert_close(found.contexts[0], stored.contexts[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(found.contexts[1], stored.contexts[1])
    found.contexts[0].square().sum().backward()
    assert all(part.up.grad.abs().max() > 0 for part in trained.loras["projection_model"].parts.values())
    assert not any(p.requires_grad for p in pipe.unet.parameters())


def test_a_model_without_gpt2_has_no_projection_to_train(models, clips, tmp_path, capsys):
    assert main(["train", "lora", str(clips), "-o", str(tmp_path / "out"), *models["film"], "-q", "--layers",
                 "projection"]) == 2
    assert "layers holds projection, which this model has not" in capsys.readouterr().err
