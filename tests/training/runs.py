"""Trainings as processes, and what their folders hold."""

import json
import os
import signal
import subprocess
import sys
import time

import torch

from tests.helpers import PACKAGES


def losses(out):
    """The loss of each step."""
    lines = [json.loads(line) for line in (out / "training/log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "held_out" not in line]


def killed(words, state):
    """Run `ldm2 WORDS` and kill it after its first save, in the file `state` -> the step of the last save."""
    environment = os.environ | {"PYTHONPATH": PACKAGES, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "ldm2", *words], env=environment)
    while process.poll() is None and not state.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return torch.load(state, weights_only=True)["step"]
