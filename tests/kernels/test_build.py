"""Where the library goes and what is said when it cannot be built. test_cpu_kernels.py compiles the real one."""

import hashlib
import os
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ldm2_kernels import build, cpu

from ldm2 import ops


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """compiler(script) is what builds run in place of g++; the file to write is $out."""
    def become(script):
        path = tmp_path / "compiler"
        path.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; out=$2\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))

    return become


def test_the_library_lies_in_the_folder_under_its_name(compiler, tmp_path):
    compiler("echo code > $out")
    path = build.build(tmp_path / "made" / "new")
    assert path == tmp_path / "made" / "new" / cpu.library_name()
    assert path.read_text() == "code\n"
    assert sorted(path.parent.iterdir()) == [path, cpu.digest_file(path)]
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_the_first_folder_that_can_be_written_to_is_taken(compiler, tmp_path, monkeypatch):
    compiler("echo code > $out")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(cpu, "folders", lambda: [tmp_path / "file", tmp_path / "cache"])
    assert build.build().parent == tmp_path / "cache"
    assert cpu.library() == tmp_path / "cache" / cpu.library_name()


def test_no_folder_to_write_to_is_an_error(compiler, tmp_path):
    compiler("echo code > $out")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write to .*file"):
        build.build(tmp_path / "file")


def test_sources_that_change_while_they_are_compiled_make_no_library(compiler, tmp_path, monkeypatch):
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "kernels.cpp").write_text("old")
    monkeypatch.setattr(cpu, "sources", lambda: sources)
    compiler(f"echo new > {sources}/kernels.cpp; echo code > $out")
    with pytest.raises(OSError, match=rf"the sources in {sources} have changed while they were compiled: build anew"):
        build.build(tmp_path / "made")
    assert not (tmp_path / "made").exists()
    cpu.library_name.cache_clear()


def test_without_a_compiler_one_line_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    monkeypatch.setattr("sys.argv", ["build_kernels", "--folder", str(tmp_path)])
    assert build.main() == 2
    assert re.search(rf"^ldm2: .*CXX.*{tmp_path}/g\+\+\)\n$", capsys.readouterr().err)


def test_a_compiler_that_fails_is_quoted(compiler, tmp_path):
    compiler("echo 'In file included from x.h' >&2; echo 'x.h:1: error: no such type' >&2; exit 1")
    with pytest.raises(OSError, match=r"compiler failed: x\.h:1: error: no such type"):
        build.build(tmp_path)
    assert cpu.library_name() not in [path.name for path in tmp_path.iterdir()]


def test_the_name_tells_the_version_of_pytorch_and_the_sources(monkeypatch, tmp_path):
    cpu.library_name.cache_clear()
    name = cpu.library_name()
    assert torch.__version__ in name
    for file in cpu.sources().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(cpu, "sources", lambda: tmp_path)
    cpu.library_name.cache_clear()
    assert cpu.library_name() == name
    (tmp_path / "simd.h").write_text("// changed")
    cpu.library_name.cache_clear()
    try:
        assert cpu.library_name() != name
    finally:
        cpu.library_name.cache_clear()


def test_a_library_of_other_sources_is_not_taken(monkeypatch, tmp_path):
    (tmp_path / cpu.library_name().replace("torch", "torch0")).write_text("old")
    monkeypatch.setattr(cpu, "folders", lambda: [tmp_path])
    assert cpu.library() is None
    assert cpu.load() is False


@pytest.fixture
def nothing_built(tmp_path, monkeypatch):
    """No library anywhere; the user's cache is a folder of this test. Returns it."""
    monkeypatch.setattr(cpu, "folders", lambda: [tmp_path / "package", tmp_path / "cache"])
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(torch.ops, "ldm2_cpu", SimpleNamespace(instruction_sets=list), raising=False)
    return tmp_path / "cache"


def test_kernels_are_built_at_first_use_into_the_users_cache_if_they_are_asked_for(
    compiler, nothing_built, monkeypatch
):
    compiler("echo code > $out")
    monkeypatch.delenv("LDM2_KERNELS", raising=False)
    assert not cpu.load()
    assert not nothing_built.exists()
    monkeypatch.setenv("LDM2_KERNELS", "auto")
    assert cpu.load()
    assert cpu.library() == nothing_built / cpu.library_name()
    compiler("exit 1")                                     # it is not built again
    assert cpu.load()


def test_kernels_that_cannot_be_built_are_told_and_plain_pytorch_runs(compiler, nothing_built, monkeypatch, caplog):
    compiler("echo 'kernels.cpp:1: error: no such flag' >&2; exit 1")
    monkeypatch.setenv("LDM2_KERNELS", "auto")
    monkeypatch.setattr(ops, "_kernels", {})
    for _ in range(2):
        assert ops.leaky_relu(torch.ones(3), 0.1).sum() == 3
    [message] = caplog.messages
    assert "LDM2_KERNELS=auto" in message and "error: no such flag" in message


def test_another_word_for_building_kernels_is_refused(nothing_built, monkeypatch):
    monkeypatch.setenv("LDM2_KERNELS", "yes")
    with pytest.raises(ValueError, match="LDM2_KERNELS must be auto or not set, got 'yes'"):
        cpu.load()


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """planted(folder): a library with its digest in a folder, by its public name. Nothing is ever loaded."""
    def plant(folder):
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / cpu.library_name()
        library.write_bytes(b"code")
        cpu.digest_file(library).write_text(hashlib.sha256(b"code").hexdigest())
        return library

    def refuse(path):
        raise AssertionError(f"{path} was loaded")

    monkeypatch.setattr(cpu, "_HERE", tmp_path / "package")
    monkeypatch.setattr(torch.ops, "load_library", refuse)
    monkeypatch.delenv("LDM2_KERNELS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "package").mkdir()
    return plant


def test_a_library_of_the_users_own_cache_is_found(planted, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library = planted(tmp_path / "cache" / "ldm2")
    assert cpu.library() == library.resolve()
    assert planted(tmp_path / "package").samefile(cpu.library())


@pytest.mark.parametrize("cache", ["", "relative", "."])
def test_a_library_in_the_current_folder_is_never_loaded(planted, tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    planted(tmp_path / cache / "ldm2")
    assert not cpu.load()


@pytest.mark.parametrize("what", ["file", "folder", "above", "group"])
def test_a_library_that_others_could_write_is_never_loaded(planted, tmp_path, monkeypatch, caplog, what):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library = planted(tmp_path / "cache" / "ldm2")
    place = {"file": library, "folder": library.parent, "above": tmp_path / "cache", "group": library.parent}[what]
    place.chmod(0o770 if what == "group" else 0o777)
    if what == "group":
        monkeypatch.setattr(os, "getegid", lambda: 12345)
    assert not cpu.load()
    assert f"others can write to {place}" in caplog.text


def test_a_folder_for_everybody_is_no_cache_but_may_hold_one(planted, tmp_path, monkeypatch):
    """As /tmp is: everybody may put files there, and change only his own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library = planted(tmp_path / "cache" / "ldm2")
    (tmp_path / "cache").chmod(0o1777)
    assert cpu.library() == library.resolve()
    library.parent.chmod(0o1777)
    assert cpu.library() is None


@pytest.mark.parametrize("what", ["file", "folder", "target"])
def test_a_library_of_another_user_is_never_loaded(planted, tmp_path, monkeypatch, caplog, what):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library = planted(tmp_path / "cache" / "ldm2")
    if what == "target":                                   # of a link in the user's own cache
        library.unlink()
        place = planted(tmp_path / "elsewhere")
        library.symlink_to(place)
    else:
        place = library if what == "file" else library.parent
    lstat = Path.lstat

    def facts(path):
        found = lstat(path)
        return SimpleNamespace(st_uid=4321, st_gid=found.st_gid, st_mode=found.st_mode) if path == place else found

    monkeypatch.setattr(Path, "lstat", facts)
    assert not cpu.load()
    assert f"{place} belongs to another user" in caplog.text


@pytest.mark.parametrize("change", ["shorter", "without digest"])
def test_a_library_that_is_not_what_was_built_is_not_loaded(planted, tmp_path, monkeypatch, caplog, change):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library = planted(tmp_path / "cache" / "ldm2")
    if change == "shorter":
        library.write_bytes(b"cod")
    else:
        cpu.digest_file(library).unlink()
    assert not cpu.load()
    assert "build it anew" in caplog.text


def test_without_a_home_the_package_alone_is_searched(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert cpu.folders() == [cpu._HERE]


def test_the_wheels_that_cibuildwheel_makes_hold_what_the_package_says():
    root = Path(__file__).parents[2]
    wheels = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    setup = (root / "setup.py").read_text()
    assert wheels["environment"] == {"LDM2_BUILD_KERNELS": "1"}
    assert 'os.environ.get("LDM2_BUILD_KERNELS") == "1"' in setup
    versions = re.findall(r"Python :: 3[.](\d+)", setup)
    assert wheels["build"] == [f"cp3{version}-manylinux_x86_64" for version in versions]
    linked = re.findall(r'"-l(\w+)"', Path(build.__file__).read_text())
    assert re.findall(r"--exclude lib(\w+)[.]so", wheels["repair-wheel-command"]) == linked
    constraints = wheels["before-build"].partition("-c {project}/")[2]
    assert re.search(r"^torch==", (root / constraints).read_text(), re.MULTILINE)
