"""The proof on the published weights, on a local hub with random ones of the published latents' shape."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ldm2
from benchmarks import checkpoints
from ldm2.checkpoints import verify
from ldm2.cli.commands import main
from tests import authors
from tests.hub import Hub

PUBLISHED = {  # diffusers 0.42, tests/pipelines/audioldm2/test_audioldm2.py
    ("audioldm2", 17275, 25): -0.2880, ("audioldm2", 31390, 3): 0.1074, ("audioldm2-large", 8825, 3): 0.5783,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny checkpoint whose latents are those of the published ones: 8 channels, 16 bins."""
    return checkpoints.save(
        tmp_path_factory.mktemp("published") / "audioldm2", vocoder=checkpoints.vocoder(model_in_dim=64),
        unet=checkpoints.unet(in_channels=8, out_channels=8, sample_size=256),
        vae=checkpoints.vae(latent_channels=8),
    )


@pytest.fixture(scope="module")
def expected(checkpoint):
    """Scheduler -> steps -> the waveform (N,) of diffusers' own pipeline, called as its tests call it."""
    pipe = checkpoints.diffusers_pipeline(checkpoint)
    config = pipe.scheduler.config

    @functools.cache
    def sound(scheduler: str, steps: int) -> np.ndarray:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(config)
        latents = torch.from_numpy(np.random.RandomState(0).standard_normal((1, 8, 128, 16))).float()
        return pipe("A hammer hitting a wooden surface", latents=latents, num_inference_steps=steps,
                    guidance_scale=2.5, generator=torch.Generator().manual_seed(0)).audios[0]

    return sound


@pytest.fixture(scope="module")
def pipe(checkpoint):
    return ldm2.load(checkpoint, dtype="float32", device="cpu", reference="diffusers")


def clean(**settings):
    """An environment with no other hub settings."""
    others = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return others | {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"} | settings


def verify_weights(*arguments, timeout=300, **settings):
    """Run the command in a process of its own."""
    return subprocess.run([sys.executable, "-m", "ldm2", "verify-weights", *arguments], capture_output=True, text=True,
                          env=clean(**settings), timeout=timeout)


# Runs the command for each line of JSON with its arguments, the pins in three steps, with an empty cache each time.
WORKER = """
import contextlib, io, json, os, shutil, sys
from dataclasses import replace
from ldm2.checkpoints import verify
from ldm2.cli.commands import main

verify.PINS = tuple(replace(pin, steps=3) for pin in verify.PINS)
for line in sys.stdin:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(["verify-weights", *json.loads(line)])
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A hub and the process that asks it: the client reads the address when it is imported."""
    with Hub() as hub:
        home = tmp_path_factory.mktemp("home")
        worker = subprocess.Popen([sys.executable, "-c", WORKER], env=clean(HF_ENDPOINT=hub.url, HF_HOME=str(home)),
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        yield hub, worker
        worker.communicate()


@pytest.fixture
def verified(server):
    """Publish a folder as cvssp/audioldm2, and run the command -> commit, exit code, stdout, stderr."""
    hub, worker = server

    def run(folder, *arguments, **options):
        hub.clear()
        commit = hub.add("cvssp/audioldm2", folder, **options)
        worker.stdin.write(json.dumps(["--model", "audioldm2", *arguments]) + "\n")
        worker.stdin.flush()
        return commit, *json.loads(worker.stdout.readline())

    return run


def test_the_pinned_samples_are_those_of_diffusers_tests():
    assert {(pin.model, pin.first, pin.steps): pin.expected[5] for pin in verify.PINS} == PUBLISHED
    assert all(len(pin.expected) == 10 for pin in verify.PINS)


@pytest.mark.parametrize("pin", verify.PINS[:2], ids=lambda pin: pin.sampler)
def test_a_pin_is_computed_as_diffusers_computes_it(pipe, checkpoint, expected, pin):
    pin = replace(pin, steps=3)
    sound = expected(pin.scheduler, 3)
    assert len(sound) == verify.NUM_SAMPLES
    own = tuple(map(float, sound[pin.first : pin.first + 10]))
    compared = verify.compare(replace(pin, expected=own), pipe, verify.scheduler(checkpoint))
    np.testing.assert_allclose(compared.found, own, atol=2e-5)
    assert compared.agrees
    assert max(map(abs, own)) > 0.01                       # there is something to compare
    moved = replace(pin, expected=(own[0] + 0.002, *own[1:]))
    compared = verify.compare(moved, pipe, verify.scheduler(checkpoint))
    assert compared.distance == pytest.approx(0.002, abs=4e-5)
    assert not compared.agrees


def test_another_schedule_does_not_stay_on_the_pipeline(pipe, checkpoint):
    before = pipe.schedule
    verify.compare(replace(verify.PINS[1], steps=1), pipe, verify.scheduler(checkpoint))
    assert pipe.schedule is before


def test_latents_of_another_shape_are_refused_before_the_work(tiny_checkpoint):
    pipe = ldm2.load(tiny_checkpoint, reference="diffusers")
    with pytest.raises(ValueError, match=r"\(1, 8, 128, 16\).*\(1, 4, 128, 8\)"):
        verify.compare(verify.PINS[0], pipe, verify.scheduler(tiny_checkpoint))


def test_every_key_is_counted_and_the_dropped_ones_are_named(checkpoint):
    with verify.watched_keys() as keys:
        pipe = ldm2.load(checkpoint, low_memory=True)
        pipe.rank(np.zeros((1, 16000), np.float32), ["silence"])
    assert keys["unet"].tensors == len(diffusers.AudioLDM2UNet2DConditionModel.from_pretrained(checkpoint / "unet")
                                       .state_dict())
    assert keys["unet"].dropped == ()
    # Each branch of CLAP drops the other's weights: what both drop is left.
    assert {name.rpartition(".")[2] for name in keys["text_encoder"].dropped} <= {
        "logit_scale_a", "logit_scale_t", "position_ids", "token_type_ids", "relative_position_index"
    }
    assert "logit_scale_a" in keys["text_encoder"].dropped


def test_facts_are_what_the_files_say(checkpoint, tmp_path):
    said = verify.facts(checkpoint)
    assert said["unet"]["sample_size"] == 256
    assert said["scheduler"]["timestep_spacing"] == "leading"
    assert said["tokenizer_2"]["symbols"] == len(checkpoints.t5_tokenizer())
    assert re.search("sample_size 256.*256 latent frames", verify.inferred(said, 256)["length"])


def test_an_authors_file_is_asked_the_same(tmp_path):
    path = authors.save(authors.whole_state(authors.modules("sound")), tmp_path / "audioldm2-full.pth")
    said = verify.facts(path)
    assert said["vae"]["scaling_factor"] == 0.5
    assert said["scheduler"]["prediction_type"] == verify.scheduler(path)["prediction_type"] == "epsilon"
    with verify.watched_keys() as keys:
        ldm2.load(path, tokenizers=authors.save_tokenizers(tmp_path / "tokenizers"), low_memory=True)
    assert {"unet", "vae", "vocoder", "text_encoder", "language_model"} <= keys.keys()


@pytest.mark.parametrize("symbols, verdict", [(183, "fits"), (38, "is another model's")])
def test_a_tokenizer_of_another_speech_model_is_told(symbols, verdict, tmp_path):
    folder = checkpoints.save_speech(tmp_path / "speech")
    words = {chr(0x4E00 + i): i for i in range(symbols)}
    (folder / "tokenizer_2" / "vocab.json").write_text(json.dumps(words))
    told = verify.inferred(verify.facts(folder), 256)["tokenizer_2"]
    assert re.search(f"^{verdict}.* {symbols} .*183", told)


def test_the_command_on_a_hub_prints_expected_found_and_distance(checkpoint, expected, verified):
    commit, code, out, err = verified(checkpoint, "--json")
    assert code == 1, err                                  # these are not the published weights
    assert re.search("^ldm2: error: 1 of 1 .*audioldm2$", err.splitlines()[-1])
    [report] = json.loads(out)
    assert (report["commit"], report["outcome"], report["reason"]) == (commit, "failed", "the samples differ")
    lms = report["pins"][1]
    sound = expected("LMSDiscreteScheduler", 3)[31390:31400]
    np.testing.assert_allclose(lms["found"], sound, atol=2e-5)
    assert lms["distance"] == pytest.approx(np.abs(np.array(lms["expected"]) - sound).max(), abs=2e-5)
    assert report["keys"]["vocoder"]["dropped"] == []
    assert report["ranking"] is None


def test_without_a_network_each_checkpoint_is_skipped_with_a_line(tmp_path):
    done = verify_weights(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["audioldm2 (cvssp/audioldm2)", "skipped"], ["audioldm2-large (cvssp/audioldm2-large)", "skipped"]
    ]
    assert "audioldm-48k" in done.stderr                   # what was not looked at is named


def test_a_checkpoint_with_an_unknown_key_fails_and_says_which(checkpoint, verified, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(checkpoint, folder)
    [file] = (folder / "unet").glob("*.safetensors")
    save_file(load_file(file) | {"surprise.weight": torch.zeros(1)}, file)
    _, code, out, _ = verified(folder)
    assert code == 1
    assert "surprise.weight" in out
    assert 'scheduler says _class_name "DDIMScheduler"' in out


def test_a_refusal_of_the_hub_is_no_lack_of_network(checkpoint, verified):
    _, code, out, _ = verified(checkpoint, token="hf_secret")
    assert code == 1
    assert "failed: cvssp/audioldm2 is gated" in out


def test_an_unknown_name_is_refused_before_anything_is_fetched(capsys):
    assert main(["verify-weights", "--model", "audioldm3"]) == 2
    out, err = capsys.readouterr()
    assert not out and "unknown model 'audioldm3'" in err


@pytest.mark.network
@pytest.mark.parametrize("name", sorted({pin.model for pin in verify.PINS}))
def test_the_published_weights_give_diffusers_samples(name):
    settings = {key: value for key, value in os.environ.items() if key.startswith("HF_") and key != "HF_HUB_OFFLINE"}
    done = verify_weights("--model", name, "--json", timeout=7200, **settings)
    [report] = json.loads(done.stdout)
    if report["outcome"] == "skipped":
        pytest.skip(report["reason"])
    assert report["outcome"] == "checked", report
