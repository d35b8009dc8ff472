"""Builds the C++ kernels of `ldm2_kernels` for the CPU: `python -m ldm2.build_kernels`, a minute, needs g++.

One shared library holds the code for all instruction sets of the machine's architecture and chooses among them when it
is loaded. Its name carries the version of PyTorch and a digest of the sources, so an old one is never taken.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-psabi"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512_BF16 = [*AVX512, "-mavx512bf16", "-mavx512vnni"]
OPERATORS = ("operators", "memory", "absorbed", "convolution", "linear_int8", "norms", "transformer")   # see PyTorch
# Instruction sets and their flags.
SETS = {"baseline": []}
if platform.machine() == "x86_64":
    SETS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16, "zen4": [*AVX512_BF16, "-DLDM2_ADDS_APART"]}


def build(folder: str | Path | None = None) -> Path:
    """Compiles the library into `folder` and returns its path; None: beside the package, or the user's cache.

    Raises ValueError if there is no compiler or ldm2_kernels is not installed, OSError if it does not compile, or if
    the sources change meanwhile: such a library, of old and new ones, would have the name of the new.
    """
    try:
        from ldm2_kernels import cpu
    except ModuleNotFoundError:
        raise ValueError("ldm2_kernels is not installed: run `pip install -e .` first") from None
    folders = cpu.folders() if folder is None else [Path(folder).absolute()]
    name = _name_now()
    library = compile_library(cpu.sources())
    if _name_now() != name:
        raise OSError(f"the sources in {cpu.sources()} have changed while they were compiled: build anew")
    return _install(library, folders, name)


def _name_now() -> str:
    """The name of the library of the sources as they are now, which is the one looked for from here on."""
    from ldm2_kernels import cpu

    cpu.library_name.cache_clear()
    return cpu.library_name()


def compile_library(sources: Path) -> bytes:
    """The shared library made of these sources. Raises ValueError without a compiler, OSError if it fails."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or shutil.which(compiler) is None:
        raise ValueError(f"no C++ compiler found: install g++ or set CXX (now {compiler or 'not set'})")
    torch_folder = Path(torch.__file__).parent
    # OpenMP's own library is not linked: PyTorch brings the one whose threads it uses.
    headers = ["-fopenmp", "-isystem", str(torch_folder / "include"),
               f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    with tempfile.TemporaryDirectory() as scratch:
        objects = {name: (f"{name}.cpp", headers) for name in OPERATORS} | {
            name: ("kernels.cpp", [f"-DLDM2_SET={name}", *flags]) for name, flags in SETS.items()
        }
        commands = [
            [compiler, *FLAGS, *flags, "-c", str(sources / source), "-o", f"{scratch}/{name}.o"]
            for name, (source, flags) in objects.items()
        ]
        print(f"compiling with {compiler}, which takes a minute ...", file=sys.stderr)
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(_call, commands))
        target = f"{scratch}/library.so"
        _call([compiler, "-shared", "-o", target, *(f"{scratch}/{name}.o" for name in objects),
               f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"])
        return Path(target).read_bytes()


def _call(command: list[str]) -> None:
    """Runs a compiler. Raises OSError with its first complaint."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        complaints = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["-"]
        raise OSError(f"{command[0]} failed: {complaints[0]}")


def _install(library: bytes, folders: list[Path], name: str) -> Path:
    """Writes the library, and its digest, into the first folder that can be written to: whole or not at all."""
    from ldm2_kernels import cpu

    for folder in folders:
        path = folder / name
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            _write(cpu.digest_file(path), hashlib.sha256(library).hexdigest().encode())
            _write(path, library)
        except OSError:
            continue
        return path
    raise OSError(f"cannot write to {' or '.join(map(str, folders))}")


def _write(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.chmod(file.name, 0o755)
    os.replace(file.name, path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ldm2.build_kernels", description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", help="where the library goes (default: beside the package ldm2_kernels)")
    args = parser.parse_args()
    try:
        print(build(args.folder))
    except (ValueError, OSError) as error:
        print(f"ldm2: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
