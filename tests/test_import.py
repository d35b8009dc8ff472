"""Importing ldm2 changes nothing for the program that imports it."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import importlib, locale, logging, os, pkgutil, random, signal, sys, warnings
import numpy, torch, transformers, tokenizers, tqdm, soundfile
from transformers.models.clap import modeling_clap
from transformers.models.vits import modeling_vits

def state():
    hooks = {name: len(value) for name, value in vars(torch.nn.modules.module).items()
             if name.startswith("_global") and hasattr(value, "__len__")}
    backends = torch.backends
    return {
        "hooks": hooks, "dtype": torch.get_default_dtype(), "device": torch.get_default_device(),
        "threads": torch.get_num_threads(), "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(), "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": (backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32), "benchmark": backends.cudnn.benchmark,
        "modes": torch._C._len_torch_function_stack(), "rng": torch.get_rng_state().tolist(),
        "numpy": (numpy.geterr(), numpy.random.get_state()[1].tolist()), "random": random.getstate(),
        "warnings": list(warnings.filters), "logging": (logging.root.level, list(logging.root.handlers)),
        "environ": dict(os.environ), "locale": locale.setlocale(locale.LC_ALL), "folder": os.getcwd(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "recursion": sys.getrecursionlimit(), "path": list(sys.path), "excepthook": sys.excepthook,
        "module": {name: id(value) for name, value in vars(torch.nn.Module).items()},
        "tensor": {name: id(value) for name, value in vars(torch.Tensor).items()},
    }

before = state()
import ldm2, ldm2_kernels
names = [module.name for package in (ldm2, ldm2_kernels)
         for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
for name in names:
    if name.startswith(("ldm2.serve.page", "ldm2.serve.ray")):     # what gradio and Ray change is theirs
        continue
    if not name.endswith("__main__") and "triton" not in open(importlib.util.find_spec(name).origin).read():
        importlib.import_module(name)
after = state()
assert len(names) > 60
print([name for name in before if before[name] != after[name]])
"""


def test_importing_every_module_changes_nothing_global():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "scipy", "sklearn", "pandas", "matplotlib", "transformers",
         "huggingface_hub", "accelerate", "diffusers", "httpx",
         "torchvision", "torchaudio", "pydantic", "yaml", "IPython")


def test_a_sound_is_made_without_what_takes_seconds_to_import(tmp_path):
    """Starting takes most of the time of a short sound: more than half of it went to modules that nothing needed."""
    script = f"""
import sys
from ldm2.cli.commands import main
code = main(["generate", "a siren", "--model", "tiny", "--steps", "1", "-o", r"{tmp_path / 'x.wav'}"])
print(code or 0, sorted(set({HEAVY}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
