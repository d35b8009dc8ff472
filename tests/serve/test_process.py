"""The command itself: what it refuses, the lines of its guide, how it stops, and what a killed one leaves."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
import soundfile

from ldm2.cli.commands import main
from ldm2.serve.folder import Folder
from tests.helpers import ROOT

GUIDE = ROOT / "docs" / "guides" / "server.md"


class Process:
    """`ldm2 serve --model tiny` with its temporary files below a folder."""

    def __init__(self, folder):
        command = [sys.executable, "-m", "ldm2", "serve", "--model", "tiny", "--port", "0", "--grace", "0.2"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder,
                                        env=os.environ | {"TMPDIR": str(folder)})
        lines = iter(self.process.stderr.readline, "")     # how loading goes, on a busy machine
        self.address = next(found[0] for found in (re.search(r"http://\S+", line) for line in lines) if found)

    def end(self, how):
        """Send a signal -> exit code, and what was said."""
        self.process.send_signal(how)
        said = self.process.communicate(timeout=60)[1]
        return self.process.returncode, said


def folders(place):
    return [path for path in place.iterdir() if path.name.startswith("ldm2-serve-")]


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_guide_works_and_nothing_is_left(tmp_path):
    seconds = np.arange(8000) / 16_000
    soundfile.write(tmp_path / "bell.wav", 0.3 * np.sin(2 * np.pi * 440 * seconds), 16_000)
    server = Process(tmp_path)
    lines = re.findall(r"^curl .*", GUIDE.read_text(), re.MULTILINE) if shutil.which("curl") else []
    for line in lines:
        there = re.sub(r"http://127.0.0.1:8000", server.address, line)
        done = subprocess.run(["bash", "-c", there], capture_output=True, text=True, cwd=tmp_path, timeout=100)
        assert done.returncode == 0 and '{"error"' not in done.stdout, (line, done)
    for name in re.findall(r" -o (\S+)", " ".join(lines)):
        assert soundfile.info(tmp_path / name).frames > 16_000
    with httpx.Client(base_url=server.address) as client:
        client.post("/v1/jobs", json={"prompt": "x", "steps": 1000, "seconds": 10}).raise_for_status()
        assert len(folders(tmp_path)) == 1
        assert server.end(signal.SIGKILL)[0] == -signal.SIGKILL
        with pytest.raises(httpx.TransportError):
            client.get("/v1/jobs")
    assert len(folders(tmp_path)) == 1
    again = Process(tmp_path)
    assert len(folders(tmp_path)) == 1
    with httpx.Client(base_url=again.address) as client:
        assert client.get("/v1/jobs").json()["data"] == []
        client.post("/v1/jobs", json={"prompt": "x", "steps": 1000, "seconds": 10}).raise_for_status()
        code, said = again.end(signal.SIGTERM)
    assert (code, said.strip()) == (0, "ldm2: stopped") and folders(tmp_path) == []


def test_folders_of_running_servers_are_left_alone(tmp_path):
    first = Folder(tmp_path)
    (first.of("job-1") / "sound.wav").write_bytes(b"x")
    second = Folder(tmp_path)
    assert len(folders(tmp_path)) == 2
    os.close(os.dup(first._lock.fileno()))
    first._lock.close()                                    # as when its process ends
    old = tmp_path / "ldm2-serve-old"
    old.mkdir()
    os.utime(old, (0, 0))
    third = Folder(tmp_path)
    assert {path.name for path in folders(tmp_path)} == {second.path.name, third.path.name}
    second.close()
    third.close()
    assert folders(tmp_path) == []


@pytest.mark.parametrize("arguments, words", [
    (["--host", "0.0.0.0"], "--host 0.0.0.0 is open to others: give --api-key"),
    (["--host", "example.org"], "is open to others"), (["--host", "::"], "is open to others"),
    (["--host", "no.such.host.invalid", "--insecure"], "cannot be listened on"),
])
def test_what_would_not_be_safe_is_refused(arguments, words, monkeypatch, capsys):
    monkeypatch.delenv("LDM2_API_KEY", raising=False)
    assert main(["serve", "--model", "tiny", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        start = time.process_time()
        assert main(["serve", "--model", "tiny", "--port", str(port)]) == 2
    assert f"127.0.0.1:{port} cannot be listened on" in capsys.readouterr().err and time.process_time() - start < 3


@pytest.mark.parametrize("arguments, words", [
    (["--port", "x"], "whole number from 0 to 65535"), (["--port", "70000"], "65535"), (["--queue", "0"], "queue must"),
    (["--max-seconds", "601"], "max_seconds must be"), (["--batch", "0"], "from 1 up"), (["--lora", "x"], "NAME=FILE"),
    (["--lora", "a/b=c"], "NAME=FILE"), (["--lora", "a=gone"], "gone does not exist"),
])
def test_wrong_arguments_are_told_in_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--model", "tiny", *arguments])
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_what_is_missing_is_named_with_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ldm2.serve.server", None)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "ldm2.serve.server")
    import ldm2.serve

    monkeypatch.delattr(ldm2.serve, "server", raising=False)
    assert main(["serve", "--model", "tiny"]) == 2
    assert "pip install 'ldm2[serve]'" in capsys.readouterr().err
