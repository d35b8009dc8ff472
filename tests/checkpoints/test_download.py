"""The way from a name to files, with the real hub client against a hub on 127.0.0.1, each time in a fresh process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub import Hub

NAME = "somebody/a-model"
WORKER = """
import json, sys
from ldm2.checkpoints import hub
for line in sys.stdin:
    try:
        answer = [str(hub.resolve(**json.loads(line))), None]
    except (ValueError, OSError) as error:
        answer = [None, f"{type(error).__name__}: {error}"]
    print(json.dumps(answer), flush=True)
"""
NEEDED = [
    "model_index.json", "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vocoder/config.json", "vocoder/model.safetensors",
]
NOT_NEEDED = [
    "README.md", ".gitattributes", "onnx/model.onnx", "samples/a.json", "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors", "unet/flax_model.msgpack", "vocoder/pytorch_model.bin",
]
PARTS = {
    "_class_name": "AudioLDM2Pipeline", "scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": [None, None],
    "tokenizer": ["transformers", "RobertaTokenizerFast"], "unet": ["audioldm2", "AudioLDM2UNet2DConditionModel"],
    "vocoder": ["transformers", "SpeechT5HifiGan"],
}


def write(folder, names, mark=""):
    """A checkpoint whose files hold their own names, repeated."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{mark}{name} " * 1000)
    (folder / "model_index.json").write_text(json.dumps(PARTS))
    return folder


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "source", NEEDED + NOT_NEEDED)


def start(*command, **settings):
    """A process with no hub settings but these. The client reads them when it is imported, so it cannot run in here."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.Popen(
        [sys.executable, *command], env=clean | {"HF_HUB_DISABLE_XET": "1"} | settings, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The hub and a process that resolves names with it."""
    with Hub() as hub:
        worker = start("-c", WORKER, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path_factory.mktemp("home")))
        yield hub, worker
        worker.communicate()


@pytest.fixture
def hub(server, source):
    server[0].clear()
    server[0].add(NAME, source)
    return server[0]


@pytest.fixture
def resolve(hub, server, tmp_path):
    """Calls ldm2.checkpoints.hub.resolve outside this process. Returns [path, None] or [None, error]."""

    def run(name=NAME, **arguments):
        worker = server[1]
        worker.stdin.write(json.dumps({"name": name, "cache_dir": str(tmp_path / "cache"), **arguments}) + "\n")
        worker.stdin.flush()
        return json.loads(worker.stdout.readline())

    return run


@pytest.fixture
def resolve_under(hub, tmp_path):
    """The same in a process of its own with these variables. Returns (path, error, what it wrote to stderr)."""

    def run(name=NAME, **settings):
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")} | settings
        output, stderr = start("-c", WORKER, **settings).communicate(json.dumps({"name": name}) + "\n", timeout=300)
        return *json.loads(output), stderr

    return run


def drop(path):
    """Take a file out of the cache, as if its download had not begun."""
    os.remove(os.path.realpath(path))
    os.remove(path)


def test_the_first_run_fetches_the_needed_files_and_nothing_else(hub, resolve_under, source):
    folder, _, stderr = resolve_under()
    assert hub.files() == sorted(NEEDED)
    assert all(Path(folder, name).read_text() == (source / name).read_text() for name in NEEDED)
    assert len(stderr.splitlines()) == 1 and stderr.startswith("downloading somebody/a-model")  # bars: on terminals


def test_a_cached_model_needs_no_request(hub, resolve):
    first = resolve()
    hub.requests.clear()
    assert resolve() == resolve(revision="main") == resolve(local_files_only=True) == first
    assert hub.requests == []


def test_a_cached_model_works_offline(hub, resolve, resolve_under):
    folder, _ = resolve()
    hub.requests.clear()
    assert resolve_under(HF_HUB_OFFLINE="1") == (folder, None, "")
    assert hub.requests == []


def test_offline_without_a_cache_says_what_to_run(hub, resolve_under):
    _, error, _ = resolve_under(HF_HUB_OFFLINE="1")
    assert re.search(f"FileNotFoundError: {NAME} .*HF_HUB_OFFLINE.*`ldm2 download {NAME}`", error)
    assert hub.requests == []


def test_local_files_only_without_a_cache_says_what_to_run(hub, resolve):
    _, error = resolve(local_files_only=True, revision="v2")
    assert re.search(f"FileNotFoundError: {NAME} .*local_files_only.*`ldm2 download {NAME} --revision v2`", error)
    assert hub.requests == []


def test_no_network_says_what_to_run(resolve_under):
    _, error, _ = resolve_under(HF_ENDPOINT="http://127.0.0.1:9")
    assert error.startswith(f"ConnectionError: {NAME} is not in the cache, and http://127.0.0.1:9 does not answer (")
    assert error.endswith(f"when online, run `ldm2 download {NAME}`")
    assert "\n" not in error


def test_a_partly_cached_model_fetches_what_is_missing(hub, resolve):
    folder, _ = resolve()
    drop(f"{folder}/vocoder/model.safetensors")
    hub.requests.clear()
    assert resolve() == [folder, None]
    assert hub.files() == ["vocoder/model.safetensors"]


def test_a_partly_cached_model_without_network_names_what_is_missing(resolve):
    folder, _ = resolve()
    drop(f"{folder}/vocoder/model.safetensors")
    _, error = resolve(local_files_only=True)
    assert f"{NAME} is only partly in the cache (it lacks: " in error
    assert "vocoder holds no weights" in error


def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub, resolve, source):
    big = "unet/diffusion_pytorch_model.safetensors"
    (source / big).write_bytes(bytes(range(256)) * 50_000)   # the client keeps pieces of 10 MB
    hub.cut.add(big)
    folder, _ = resolve()
    assert Path(folder, big).read_bytes() == (source / big).read_bytes()
    assert len(hub.ranges) == 1
    assert hub.ranges[0].startswith(f"{big} bytes=1")


def test_a_revision_is_a_branch_or_a_commit(hub, resolve, tmp_path):
    commit = hub.add(NAME, write(tmp_path / "other", NEEDED, mark="other "), revision="v2")
    by_branch, _ = resolve(revision="v2")
    by_commit, _ = resolve(revision=commit)
    by_default, _ = resolve()
    assert by_branch == by_commit != by_default
    assert Path(by_branch, "unet/config.json").read_text().startswith("other ")


def test_a_wrong_revision_is_named(resolve):
    assert resolve(revision="v9") == [None, f"OSError: {NAME} has no revision 'v9'"]


def test_a_wrong_repository_is_named(hub, resolve):
    _, error = resolve("nobody/nothing")
    assert re.search(f"OSError: .*nobody/nothing.*{hub.url}.*private.*HF_TOKEN", error)


def test_a_gated_repository_asks_for_a_token_and_takes_it(hub, resolve, resolve_under, source):
    hub.add("somebody/gated", source, token="hf_secret")
    _, error = resolve("somebody/gated")
    assert re.search(f"OSError: somebody/gated is gated.*{hub.url}/somebody/gated.*HF_TOKEN", error)
    assert resolve_under("somebody/gated", HF_TOKEN="hf_secret")[0] is not None


def test_a_private_repository_takes_the_token_of_the_call(hub, resolve, source):
    hub.add("somebody/private", source, token="hf_secret", private=True)
    assert "or it is private" in resolve("somebody/private")[1]
    assert resolve("somebody/private", token="hf_secret")[0] is not None


def test_pickles_are_fetched_where_there_are_no_safetensors(hub, resolve, source):
    (source / "vocoder/model.safetensors").unlink()
    resolve()
    assert "vocoder/pytorch_model.bin" in hub.files()
    assert "unet/diffusion_pytorch_model.bin" not in hub.files()


def test_all_shards_are_fetched(hub, resolve, source):
    (source / "vocoder/model.safetensors").unlink()
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    write(source, [f"vocoder/{name}" for name in shards])
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    (source / "vocoder/model.safetensors.index.json").write_text(json.dumps(index))
    folder, _ = resolve()
    assert [name for name in hub.files() if name.startswith("vocoder/")] == [
        "vocoder/config.json", *(f"vocoder/{name}" for name in shards), "vocoder/model.safetensors.index.json"
    ]
    drop(f"{folder}/vocoder/{shards[1]}")
    assert f"{shards[1]} is missing" in resolve(local_files_only=True)[1]


def test_a_variant_is_fetched_instead_of_the_plain_file(hub, resolve, source):
    write(source, ["vocoder/model.fp16.safetensors"])
    assert resolve(variant="fp16")[0] is not None
    assert [name for name in hub.files() if name.endswith((".safetensors", ".bin"))] == [
        "unet/diffusion_pytorch_model.fp16.safetensors", "vocoder/model.fp16.safetensors"
    ]


def test_a_variant_that_is_nowhere_is_named(resolve):
    assert resolve(variant="int8")[1].endswith("is not complete, it lacks: weights of the variant 'int8'")


def test_a_part_without_the_variant_is_fetched_plain(hub, resolve, source):
    assert resolve(variant="fp16")[0] is not None
    assert [name for name in hub.files() if name.endswith((".safetensors", ".bin"))] == [
        "unet/diffusion_pytorch_model.fp16.safetensors", "vocoder/model.safetensors"
    ]
    hub.requests.clear()
    assert resolve(variant="fp16")[0] is not None and hub.requests == []


def test_a_repository_in_another_layout_is_refused(hub, resolve, tmp_path):
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    hub.add("somebody/llama", folder)
    _, error = resolve("somebody/llama")
    assert re.search(r"ValueError: somebody/llama .*model_index\.json.*main", error)


def test_a_repository_without_the_weights_of_a_part_is_refused(resolve, source):
    for name in ("model.safetensors", "pytorch_model.bin"):
        (source / "vocoder" / name).unlink()
    assert f"{NAME} at revision main is not complete, it lacks: " in resolve()[1]


def test_a_mirror_without_the_commit_of_the_table_gives_its_main_branch(hub, resolve, source):
    commit = hub.add("cvssp/audioldm2", source)
    folder, _ = resolve("audioldm2")
    assert folder.endswith(commit)
    hub.requests.clear()
    assert resolve("audioldm2") == resolve("cvssp/audioldm2") == [folder, None]
    assert hub.requests == []


def test_an_original_checkpoint_is_one_file(hub, resolve, tmp_path):
    folder = write(tmp_path / "original", ["audioldm2-full.pth", "README.md"])
    hub.add("haoheliu/audioldm2-full", folder)
    path, _ = resolve("audioldm2-full")
    assert path.endswith("/audioldm2-full.pth")
    assert hub.files() == ["audioldm2-full.pth"]
    hub.requests.clear()
    assert resolve("haoheliu/audioldm2-full") == [path, None]
    assert hub.requests == []


def test_the_variable_says_where_the_cache_is(resolve_under, tmp_path):
    assert resolve_under(HF_HUB_CACHE=str(tmp_path / "here"))[0].startswith(str(tmp_path / "here"))


def test_the_command_prints_the_folder(hub, tmp_path):
    command = start("-m", "ldm2", "download", NAME, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"))
    output, stderr = command.communicate(timeout=300)
    assert command.returncode == 0, stderr
    assert Path(output.strip().splitlines()[-1], "model_index.json").is_file()


# What came is what the hub lists


@pytest.mark.parametrize("name", ["model_index.json", "vocoder/config.json", "vocoder/model.safetensors"])
def test_a_file_that_comes_short_is_refused_and_fetched_again(hub, resolve, source, name):
    hub.short.add(name)
    _, error = resolve()
    size = (source / name).stat().st_size
    assert f"{name} has {size - 7} bytes, the hub lists {size}" in error
    assert "run `ldm2 download somebody/a-model` again" in error
    hub.short.clear()
    folder, error = resolve()
    assert error is None
    assert (Path(folder) / name).read_bytes() == (source / name).read_bytes()


def test_weights_of_another_hash_are_refused(hub, resolve, source):
    hub.wrong.add("vocoder/model.safetensors")
    _, error = resolve()
    assert "vocoder/model.safetensors has another SHA-256 than the hub lists" in error
    hub.wrong.clear()
    assert resolve()[1] is None


def test_force_fetches_what_is_in_the_cache_anew(hub, resolve, source):
    folder, _ = resolve()
    file = Path(folder) / "vocoder/model.safetensors"
    Path(os.path.realpath(file)).write_bytes(b"damaged")
    assert resolve()[1] is None                            # names alone tell nothing
    assert file.read_bytes() == b"damaged"
    assert resolve(force=True)[1] is None
    assert file.read_bytes() == (source / "vocoder/model.safetensors").read_bytes()


def test_force_is_for_the_hub(resolve, tmp_path):
    (tmp_path / "model.pth").write_bytes(b"")
    assert "only what comes from the hub can be downloaded again" in resolve(str(tmp_path / "model.pth"), force=True)[1]
    assert "tiny is part of this package" in resolve("tiny", force=True)[1]
