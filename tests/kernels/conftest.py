"""The library of the CPU kernels."""

import fcntl
import os
import shutil

import pytest
import torch
from ldm2_kernels import cpu
from ldm2_kernels.build import build

from ldm2 import ops


@pytest.fixture(scope="session")
def library_folders(tmp_path_factory):
    """Where the library is: a process can load one only. Built where there is none; skipped without a compiler."""
    if cpu.library() is not None:
        return cpu.folders()
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    if os.environ.get("PYTEST_XDIST_WORKER") is None:
        folder = tmp_path_factory.mktemp("library")
        build(folder)
        return [folder]
    folder = tmp_path_factory.getbasetemp().parent / "library"               # of all processes of the run
    folder.mkdir(mode=0o700, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / cpu.library_name()).exists():
            build(folder)
    return [folder]


@pytest.fixture(scope="module")
def library(library_folders):
    """Operations on the CPU take the kernels while a module runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "folders", lambda: library_folders)
        patch.setattr(ops, "_kernels", {})
        cpu.load()
        yield torch.ops.ldm2_cpu


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512_bf16", "zen4"])
def instruction_set(library, request):
    if request.param not in library.instruction_sets():
        pytest.skip("not on this machine, or masked")
    library.use_instruction_set(request.param)
    yield request.param
    library.use_instruction_set(library.instruction_sets()[0])
