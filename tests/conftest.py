"""Fixtures: one tiny checkpoint for the whole run, and single-threaded torch so that equal means equal."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")        # before torch: waiting threads starve a busy machine

import pytest
import torch

if not torch.cuda.is_available():                          # Triton reads this when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Whole generations, processes, compilers and the like: what is not in the fast lane (python -m pytest -m fast).
LONG = (
    "batch", "benchmarks", "checkpoints/original", "checkpoints/test_convert", "checkpoints/test_damaged",
    "checkpoints/test_download", "checkpoints/test_verify", "cli", "compat", "fuzz", "kernels", "metrics",
    "runtime/test_copies", "runtime/test_fork", "runtime/test_host", "runtime/test_inference", "runtime/test_lora",
    "runtime/test_profiling", "runtime/test_threads", "runtime/test_weight_layout", "serve", "test_comfyui",
    "test_docs", "test_examples", "test_full_size", "test_import", "test_long", "test_pipeline", "test_tiny",
    "training",
)


def pytest_collection_modifyitems(items):
    """Marks the fast lane."""
    for item in items:
        other = any(item.get_closest_marker(name) for name in ("slow", "network"))
        if not other and not item.nodeid.removeprefix("tests/").startswith(LONG):
            item.add_marker(pytest.mark.fast)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny models are slower with more threads, and reductions do not depend on the machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def full_float32():
    """On CUDA convolutions of float32 are those of TF32 by default, which has the 10 bits of float16."""
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def same_numbers():
    """What a test draws without a generator of its own is the same in each run and order."""
    torch.manual_seed(0)


@pytest.fixture(params=[False, True], ids=["no-bfloat16", "bfloat16"])
def bfloat16_instructions(request, monkeypatch):
    """A CPU without and one with instructions for bfloat16, whichever runs the test."""
    told = {"avx2": True, "avx512_bf16": request.param, "amx_bf16": request.param}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    return request.param


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """Folder of a tiny random checkpoint with the structure of cvssp/audioldm2."""
    from benchmarks import checkpoints  # needs diffusers, which the tests of kernels do without

    return checkpoints.save(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def oracle(tiny_checkpoint):
    """diffusers' pipeline with DDIM on `tiny_checkpoint`."""
    from benchmarks import checkpoints

    return checkpoints.diffusers_pipeline(tiny_checkpoint)
