"""Layouts of sounds with captions, and what is wrong with some."""

import json

import numpy as np
import pytest
import soundfile

from ldm2.training.data import read, texts


def sound(path, seconds=0.1):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(int(16_000 * seconds)), 16_000)
    return path


def captions(data):
    """Captions by the names of the files."""
    return {clip.path.name: clip.captions for clip in data.clips}


def test_text_files_beside_sounds_hold_a_caption_a_line(tmp_path):
    sound(tmp_path / "deep/a.wav").with_suffix(".txt").write_text("\ufeffa dog\n\n a dog barks \n", encoding="utf-8")
    sound(tmp_path / "b.FLAC").with_suffix(".txt").write_text("rain")
    assert captions(read(tmp_path)) == {"a.wav": ("a dog", "a dog barks"), "b.FLAC": ("rain",)}


@pytest.mark.parametrize(("name", "text"), [
    ("metadata.csv", "file_name,text\nx/a.wav,a dog\nb.wav,\"rain, wind\"\n"),
    ("metadata.csv", "file_name;caption\nx/a.wav;a dog\nb.wav;rain, wind\n"),
    ("metadata.jsonl", '{"file_name": "x/a.wav", "text": "a dog"}\n{"file_name": "b.wav", "text": "rain, wind"}\n'),
    ("manifest.jsonl", '{"id": "1", "path": "x/a.wav", "status": "ok", "prompt": "a dog"}\n'
     '{"id": "2", "path": "gone.wav", "status": "error", "prompt": "x"}\n'
     '{"id": "3", "path": "b.wav", "status": "ok", "prompt": "rain, wind"}\n'),
])
def test_a_folder_with_a_table(tmp_path, name, text):
    sound(tmp_path / "x/a.wav"), sound(tmp_path / "b.wav")
    (tmp_path / name).write_text(text)
    found = read(tmp_path)
    assert captions(found) == {"a.wav": ("a dog",), "b.wav": ("rain, wind",)}
    assert found.skipped == []


def test_the_authors_json_and_all_of_its_captions(tmp_path):
    sound(tmp_path / "sounds/a.wav")
    rows = [{"wav": "a.wav", "caption": "a dog", "caption_1": "barking", "labels": "/m/01", "seg_label": ""}]
    (tmp_path / "train.json").write_text(json.dumps({"data": rows}))
    assert captions(read(tmp_path / "train.json", tmp_path / "sounds")) == {"a.wav": ("a dog", "barking")}


def test_rows_about_one_sound_are_one_clip(tmp_path):
    sound(tmp_path / "a.wav")
    (tmp_path / "t.csv").write_text("file_name,caption\na.wav,a dog\na.wav,barking\n")
    assert captions(read(tmp_path / "t.csv")) == {"a.wav": ("a dog", "barking")}


def test_a_transcription_comes_along(tmp_path):
    sound(tmp_path / "a.wav")
    (tmp_path / "metadata.csv").write_text("file_name,text,transcription\na.wav,a woman,hello\n")
    assert read(tmp_path).clips[0].transcription == "hello"


def test_what_has_no_caption_is_left_out_and_named(tmp_path):
    sound(tmp_path / "a.wav").with_suffix(".txt").write_text("a dog")
    sound(tmp_path / "empty.wav").with_suffix(".txt").write_text(" \n")
    sound(tmp_path / "none.wav")
    sound(tmp_path / "binary.wav").with_suffix(".txt").write_bytes(b"\xff\xfe\x00")
    found = read(tmp_path)
    assert captions(found) == {"a.wav": ("a dog",)}
    assert [any(word in line for line in found.skipped) for word in
            ("binary.txt", "empty.txt is empty", "none.txt is missing")] == [True] * 3
    with pytest.raises(ValueError, match=r"binary\.txt"):
        read(tmp_path, strict=True)


@pytest.mark.parametrize(("row", "why"), [
    ('{"file_name": "a.wav", "text": ""}', "line 1: no caption for a.wav"),
    ('{"file_name": "a.wav", "text": 3}', "line 1: text must be a string, got int"),
    ('{"file_name": "b.wav", "text": "x"}', "b.wav is missing"),
    ('{"text": "x"}', "line 1: no path"),
    ("{", "not JSON"),
    ('{"file_name": "a.wav", "text": "\\ud800"}', "unpaired surrogate"),
])
def test_a_table_of_which_nothing_is_left(tmp_path, row, why):
    sound(tmp_path / "a.wav")
    (tmp_path / "metadata.jsonl").write_text(row + "\n")
    with pytest.raises(ValueError, match=why) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_places_without_clips(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no sound"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"a folder or a table .*got .*a\.wav"):
        read(sound(tmp_path / "a.wav"))
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold a list"):
        read(tmp_path / "t.json")


def test_prompts_stand_one_a_line(tmp_path):
    (tmp_path / "keep.txt").write_text("a siren\n\n wind \n")
    assert texts(tmp_path / "keep.txt", "prompt") == ["a siren", "wind"]
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        texts(tmp_path / "none.txt", "prompt")
