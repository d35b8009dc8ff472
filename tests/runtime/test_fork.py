"""A process that was forked has no threads of OpenMP: it works in one and says so, it does not wait for them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
import numpy, torch
torch.set_num_threads(2)
import ldm2
pipe = ldm2.load(sys.argv[1], device="cpu")
settings = {"steps": 2, "seconds": 1.0, "seed": 1}
before = pipe.generate("rain", **settings).waveforms
child = os.fork()
if not child:
    again = pipe if sys.argv[2] == "made" else ldm2.load(sys.argv[1], device="cpu", dtype=sys.argv[2])
    sound = again.generate("rain", **settings).waveforms
    sys.stdout.write(f"{torch.get_num_threads()} {numpy.isfinite(sound).all()}")
    sys.stdout.flush()
    os._exit(0)
_, status = os.waitpid(child, 0)
sys.exit(status != 0 or torch.get_num_threads() != 2)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("loaded", ["made", "bfloat16"])
def test_a_forked_process_makes_sound(tiny_checkpoint, loaded):
    done = subprocess.run([sys.executable, "-c", SCRIPT, tiny_checkpoint, loaded], capture_output=True, text=True,
                          timeout=300)
    assert (done.stdout, done.returncode) == ("1 True", 0), done.stderr
    assert done.stderr.count("it computes in one thread") == 1
