"""Files that are there whole or not at all. What a sound file adds to this is in test_audio."""

import errno
import os
import subprocess
import sys

import pytest

from ldm2 import atomic
from tests.helpers import ROOT


def test_what_was_written_gets_its_name_at_the_end(tmp_path):
    with atomic.whole(tmp_path / "x") as temporary:
        temporary.write_text("all of it")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_text() == "all of it"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_left_and_nothing_lost_when_writing_fails(tmp_path, overwrite):
    (tmp_path / "x").write_text("old")
    with pytest.raises(RuntimeError), atomic.whole(tmp_path / "x", overwrite) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "x").read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_file_that_appears_in_the_meantime_is_kept_unless_overwriting_is_asked_for(tmp_path, monkeypatch, hard_links):
    def no_links(source, target):
        raise PermissionError

    if not hard_links:
        monkeypatch.setattr(os, "link", no_links)
    for overwrite in (False, True):
        try:
            with atomic.whole(tmp_path / "x", overwrite) as temporary:
                temporary.write_text("ours")
                (tmp_path / "x").write_text("somebody else's")
        except FileExistsError as error:
            assert not overwrite and "exists" in str(error) and str(tmp_path / "x") in str(error)
        assert (tmp_path / "x").read_text() == ("ours" if overwrite else "somebody else's")
        assert os.listdir(tmp_path) == ["x"]


def test_an_error_names_the_file_by_its_own_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*/none/x'"), \
            atomic.whole(tmp_path / "none" / "x"):
        pass


def test_the_disk_has_the_file_before_it_has_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda number: there.append((tmp_path / "x").exists()))
    there = []
    with atomic.whole(tmp_path / "x"):
        pass
    assert there == [False]


def test_a_place_may_be_taken_by_what_is_not_there(tmp_path):
    atomic.check_writable(tmp_path / "x")
    (tmp_path / "x").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileExistsError, match="x exists already"):
        atomic.check_writable(tmp_path / "x")
    atomic.check_writable(tmp_path / "x", overwrite=True)


def test_an_input_is_not_overwritten_even_if_asked_for(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(ValueError, match="x is the input: choose another name"):
        atomic.check_writable(tmp_path / "x", overwrite=True, inputs=[tmp_path / "x"])


# --- several files, and what the killed leave ------------------------------------------------------------------------

def test_several_files_appear_together_or_not_at_all(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    paths[2].write_text("in the way")
    with pytest.raises(FileExistsError, match="c exists already"), atomic.together(paths) as temporaries:
        for temporary in temporaries:
            temporary.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["c"] and paths[2].read_text() == "in the way"


def test_a_full_disk_is_told_with_the_name_that_was_asked_for(tmp_path):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"No space left.*x\.wav"), atomic.together([tmp_path / "x.wav"]):
        full()


@pytest.mark.skipif(os.name != "posix", reason="who runs cannot be told elsewhere")
def test_what_a_killed_process_left_is_gone_after_the_next_run(tmp_path):
    code = """
import os, sys, pathlib
from ldm2 import atomic
with atomic.together([pathlib.Path(sys.argv[1]) / "x"]):
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    [left] = tmp_path.iterdir()
    alive = tmp_path / left.name.replace(left.name.split("-")[2], str(os.getpid()))
    foreign = tmp_path / ".ldm2-00000000-1-0011223344556677.tmp"
    alive.touch()
    foreign.touch()
    with atomic.together([tmp_path / "y"]):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"y", alive.name, foreign.name}
