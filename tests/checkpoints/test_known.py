"""The table of known checkpoints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ldm2.checkpoints import hub, known
from ldm2.cli.checkpoints import table

COMMIT = "c8e7e189d324425c05c4c2f81214041ef4107983"


@pytest.fixture
def cache(tmp_path):
    """A hub cache that holds a checkpoint without parts as the main branch of cvssp/audioldm2."""
    repo = tmp_path / "models--cvssp--audioldm2"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text(json.dumps({"_class_name": "AudioLDM2Pipeline"}))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return tmp_path


def test_every_name_and_alias_means_one_checkpoint():
    names = [name for model in known.MODELS for name in (model.name, *model.aliases)]
    assert len(names) == len(set(names))
    assert all(known.find(name).name == name or name in known.find(name).aliases for name in names)


def test_the_short_names_of_the_published_checkpoints():
    assert [known.find(name).repo for name in ("audioldm2", "audioldm2-large", "audioldm2-music")] == [
        "cvssp/audioldm2", "cvssp/audioldm2-large", "cvssp/audioldm2-music"
    ]


@pytest.mark.parametrize("name", [
    "audioldm2-full", "audioldm2-full-large-1150k", "audioldm2-music-665k", "audioldm2-speech-gigaspeech",
    "audioldm2-speech-ljspeech", "audioldm_48k", "audioldm_16k_crossattn_t5",
])
def test_the_authors_names_mean_their_pth_files(name):
    model = known.find(name)
    assert model.layout == "original"
    assert model.file == f"{name}.pth"
    assert model.repo.startswith("haoheliu/")


def test_a_repository_is_found_by_its_hub_name():
    assert known.find("cvssp/audioldm2-large") is known.find("audioldm2-large")
    assert known.find("somebody/something") is None


def test_a_repository_with_two_checkpoints_asks_which():
    with pytest.raises(ValueError, match="choose audioldm2-speech-gigaspeech or audioldm2-speech-ljspeech"):
        known.find("haoheliu/audioldm2-speech")


def test_revisions_are_whole_commits():
    assert all(re.fullmatch("[0-9a-f]{40}", model.revision) for model in known.MODELS if model.revision is not None)


def test_same_weights_is_said_on_both_sides():
    pairs = {(model.name, model.same_as) for model in known.MODELS if model.same_as is not None}
    assert pairs == {(other, name) for name, other in pairs}
    assert ("audioldm2", "audioldm2-full") in pairs


def test_an_unknown_name_lists_the_known_ones_closest_first():
    message = str(known.unknown("audioldm2-lage"))
    assert message.startswith("unknown model 'audioldm2-lage' (did you mean audioldm2-large")
    assert all(model.name in message for model in known.MODELS)
    assert "\n" not in message


def test_cached_looks_at_the_cache_only(cache, tmp_path):
    assert hub.is_cached(known.find("audioldm2"), cache)
    assert not hub.is_cached(known.find("audioldm2-large"), cache)
    assert not hub.is_cached(known.find("audioldm2"), tmp_path / "empty")


def test_a_checkpoint_that_lacks_a_part_is_not_cached(cache):
    index = next(cache.glob("*/snapshots/*/model_index.json"))
    index.write_text(json.dumps({"unet": ["audioldm2", "AudioLDM2UNet2DConditionModel"]}))
    assert not hub.is_cached(known.find("audioldm2"), cache)


def test_the_table_has_a_line_for_each_checkpoint(cache):
    head, *lines = table(cache).splitlines()
    assert head.split()[:4] == ["name", "task", "rate", "parameters"]
    assert [line.split()[0] for line in lines] == [model.name for model in known.MODELS]
    line = next(line for line in lines if line.startswith("audioldm2 "))
    assert line.split() == ["audioldm2", "sound", "16", "kHz", "1118", "M", "4.5", "GB", "yes", "CC-BY-NC-SA-4.0",
                            "cvssp/audioldm2", "audioldm2-full"]


def test_a_bundled_checkpoint_is_a_folder_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "BUNDLED", tmp_path)
    with pytest.raises(FileNotFoundError, match="tiny is missing"):
        hub.resolve("tiny")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "model_index.json").write_text("{}")
    assert hub.resolve("tiny") == tmp_path / "tiny"


def test_importing_the_table_imports_nothing_heavy():
    heavy = {"torch", "transformers", "huggingface_hub", "numpy"}
    code = f"import ldm2.checkpoints.known, sys; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_weights_md_tells_each_checkpoint_as_the_table_does():
    lines = (Path(__file__).parents[2] / "weights.md").read_text().splitlines()
    for model in known.MODELS:
        line = next(line for line in lines if line.startswith(f"| `{model.name}`"))
        assert model.license.lower() in line.lower()
        assert (model.repo or "this package") in line
        assert model.layout == "bundled" or (model.revision or "| main (") in line
