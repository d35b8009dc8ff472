"""Where the files of a job go: addresses of fsspec, their locks and their lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from ldm2.batch import manifest, remote
from ldm2.batch.local import Folder, Locked
from ldm2.cli.commands import main

fsspec = pytest.importorskip("fsspec")
SHORT = {"steps": 2, "seconds": 0.4}


@pytest.fixture
def address():
    """An address in memory that nothing lies at."""
    files = fsspec.filesystem("memory")
    yield "memory://job"
    if files.exists("/job"):
        files.rm("/job", recursive=True)


@pytest.fixture
def batch(tmp_path, monkeypatch, capsys):
    """Run `ldm2 batch` over three rows -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remote.Lease.__init__, "__kwdefaults__", {"settle": 0.0})
    rows = [{"prompt": f"low hum {i}", "id": f"r{i}", **SHORT} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": ""}]))

    def call(out, *arguments):
        code = main(["batch", "rows.jsonl", "-o", out, "--model", "tiny", "-q", "--batch", "1", *arguments])
        return code, *capsys.readouterr()

    return call


def held(place) -> dict[str, bytes]:
    """The sounds at a place, by their names."""
    names = [record["path"] for record in merged(place) if record["path"]]
    with place.read(names) as paths:
        return {name: path.read_bytes() for name, path in zip(names, paths)}


def merged(place) -> list[dict]:
    """The merged manifest."""
    with place.read(["manifest.jsonl"]) as [path]:
        return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_address_holds_what_a_folder_holds_and_resumes(batch, address, tmp_path):
    assert batch("out")[0] == 1 and batch(address)[0] == 1
    here, there = Folder(tmp_path / "out"), remote.opened(address)
    assert held(here) == held(there) and len(held(there)) == 3
    assert [record["status"] for record in merged(there)] == ["ok", "ok", "ok", "error"]
    assert "job.json" in there.names() and "manifest.parquet" in there.names()
    assert fsspec.filesystem("memory").glob("/job/.*") == []                 # neither locks nor temporary files
    lost = next(iter(held(there)))
    fsspec.filesystem("memory").rm_file(f"/job/{lost}")
    code, out, _ = batch(address)
    assert "4 rows: 2 were done before, 1 done now, 1 failed" in out and held(there) == held(here)
    code, _, err = batch(address, "--format", "wav")
    assert code == 2 and "memory://job belongs to another job: format was 'flac', is 'wav'" in err


def test_file_addresses_are_folders(tmp_path):
    place = remote.opened(f"file://{tmp_path}/a folder")
    assert isinstance(place, Folder) and place.path == tmp_path / "a folder"


@pytest.mark.parametrize("out, words", [
    ("nowhere://x", "nowhere://x is no place for files: Protocol not known"),
    ("s3://bucket/x", "s3://bucket/x needs a package more: .*s3fs"),
])
def test_an_address_that_nothing_is_known_of_is_refused(batch, monkeypatch, out, words):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    code, _, err = batch(out)
    assert code == 2 and err.count("\n") == 1
    with pytest.raises((ValueError, ImportError), match=words):
        remote.opened(out)


def test_a_place_that_cannot_be_reached_is_one_line(batch, address, monkeypatch):
    class Gone(Exception):
        """What the library of an object store raises."""

    def refuse(self, *_, **__):
        raise Gone("no credentials\nwere found")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "ls", refuse)
    code, _, err = batch(address)
    assert code == 2 and "memory://job: Gone: no credentials were found" in err and err.count("\n") == 1


def test_memory_is_of_one_process(batch, address):
    code, _, err = batch(address, "--workers", "2")
    assert code == 2 and "memory://job is of one process" in err


def test_a_lock_at_an_address_lives_as_long_as_its_owner(address):
    place = remote.opened(address)
    lock = remote.Lease(place, ".lock-1of1", settle=0)
    with pytest.raises(Locked, match=r"memory://job/\.lock-1of1 is in use"):
        remote.Lease(place, ".lock-1of1", settle=0)
    lock.close()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here, now = remote.machine(), time.time()
    for owner, renewed, free in (
        (f"{here}-{dead.pid}-x", now, True), (f"{here}-{os.getpid()}-x", now, False), ("afar-1-x", now, False),
        ("afar-1-x", now - 2 * remote.DEAD, True), (None, None, True),
    ):
        place.put(".lock-1of1", json.dumps({"owner": owner, "renewed": renewed}).encode())
        if free:
            remote.Lease(place, ".lock-1of1", settle=0).close()
        else:
            with pytest.raises(Locked):
                remote.Lease(place, ".lock-1of1", settle=0)


def test_lines_at_an_address_are_whole_and_of_one_writer(address, monkeypatch):
    place = remote.opened(address)
    monkeypatch.setattr(remote, "LINES", 3)
    one, other = place.log("manifest-1of1-0"), place.log("manifest-1of1-0")
    for number in range(7):
        one.add(json.dumps({"id": f"{number}", "status": "error"}).encode() + b"\n")
    other.add(b'{"id": "7", "status": "error"}\n')
    assert len(manifest.settled(place)) == 6                                 # the others are kept back
    one.close()
    other.close()
    assert len(manifest.settled(place)) == 8
    assert manifest.written(place, "1of1-0").keys() == {str(number) for number in range(8)}
    assert manifest.written(place, "1of1-1") == {}
