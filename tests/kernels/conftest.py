"""The library of the CPU kernels."""

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
    folder = tmp_path_factory.mktemp("library")
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
