"""Find a checkpoint: in a folder, in the hub's cache, or on the hub. Imports no torch, and the hub client when needed.

Everything goes through huggingface_hub and its cache, so HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and
HF_HUB_OFFLINE count. A checkpoint that is complete in the cache is used without any request.
"""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ldm2.checkpoints import known
from ldm2.checkpoints.known import Model
from ldm2.fields import check_folder, first_line, named, one_line, read_json, sha256_of, short
from ldm2.schedules import CLASSES as SCHEDULERS

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile, RepoFolder

logger = logging.getLogger(__name__)

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
SUFFIXES = (".safetensors", ".bin")                        # in order of preference
WITHOUT_WEIGHTS = re.compile(r".*(Scheduler|Tokenizer|TokenizerFast|FeatureExtractor|Processor)")
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
SMALL = (".json", ".txt", ".model")                        # configs and tokenizers
PIPELINES = ("AudioLDM2Pipeline", "AudioLDMPipeline", "MusicLDMPipeline")
# What each part may be, by the class names of model_index.json; parts of other names are nothing that sound is made of.
CLASSES = {
    "unet": re.compile(r"AudioLDM2UNet2DConditionModel|UNet2DConditionModel"),
    "vae": re.compile(r"AutoencoderKL"),
    "vocoder": re.compile(r"SpeechT5HifiGan"),
    "scheduler": re.compile(rf"{'|'.join(SCHEDULERS)}"),
    "text_encoder": re.compile(r"ClapModel|ClapTextModelWithProjection"),
    "text_encoder_2": re.compile(r"T5EncoderModel|T5ForConditionalGeneration|VitsModel"),
    "projection_model": re.compile(r"AudioLDM2ProjectionModel"),
    "language_model": re.compile(r"GPT2Model|GPT2LMHeadModel"),
    "tokenizer": re.compile(r"(Roberta|PreTrained)Tokenizer(Fast)?|TokenizersBackend"),
    "tokenizer_2": re.compile(r"(T5|Vits|PreTrained)Tokenizer(Fast)?|TokenizersBackend"),
    "feature_extractor": re.compile(r"ClapFeatureExtractor|ClapProcessor"),
}
_PLAIN_NAME = re.compile(r"\w[\w-]{0,99}", re.ASCII)
_PLAIN_FILE = re.compile(r"\w[\w.-]{0,199}", re.ASCII)
BUNDLED = Path(__file__).parents[1]                          # folders of the checkpoints that travel with this package


# The files of a folder in the hub's layout


def weight_files(folder: str | Path, variant: str | None = None) -> list[Path]:
    """Weight files of one part of a checkpoint, safetensors before pickles, shards in the order of their index.

    `variant` is the word in names such as model.fp16.safetensors; a part without such a file gives its plain one.
    Raises ValueError if there is none of both, if a shard is missing, or if the index cannot be read.
    """
    folder = Path(folder)
    check_folder(folder)
    names = [path.name for path in folder.iterdir()]
    chosen = choose_weights(names, variant)
    if not chosen:
        wanted = " or ".join(f"{stem}{_infix(variant)}.safetensors" for stem in STEMS[:2])
        found = ", ".join(sorted(names)) or "nothing"
        others = variants(names)
        hint = f"; load its variant {others[0]!r}" if others else ""
        raise ValueError(f"{folder} holds no weights: expected {wanted} (or .bin), found {found}{hint}")
    if chosen[0].endswith(".json"):
        return _shards(folder / chosen[0])
    return [folder / chosen[0]]


def choose_weights(names: Iterable[str], variant: str | None = None) -> list[str]:
    """Of the file names in one folder those of its weights, each tensor once: one file, or an index and its shards.

    Those of the variant, or the plain ones where it has none.
    """
    names, infix = sorted(names), _infix(variant)
    for suffix in SUFFIXES:
        for stem in STEMS:
            if f"{stem}{infix}{suffix}" in names:
                return [f"{stem}{infix}{suffix}"]
            index = f"{stem}{suffix}.index{infix}.json"
            if index in names:
                # The variant stands before or after the number, depending on the version that wrote the shards.
                shard = re.compile(rf"{stem}({re.escape(infix)})?-\d+-of-\d+({re.escape(infix)})?{re.escape(suffix)}")
                return [index, *filter(shard.fullmatch, names)]
    return choose_weights(names) if variant else []


def variants(names: Iterable[str]) -> list[str]:
    """The variants of which there are weights under these file names, in their order: "fp16" of model.fp16.bin."""
    stems, suffixes = "|".join(STEMS), "|".join(map(re.escape, SUFFIXES))
    pattern = re.compile(rf"(?:{stems})(?:\.([\w-]+)(?:{suffixes})|(?:{suffixes})\.index\.([\w-]+)\.json)")
    found = (match.group(1) or match.group(2) for match in map(pattern.fullmatch, sorted(names)) if match)
    return list(dict.fromkeys(found))


def _infix(variant: str | None) -> str:
    return f".{variant}" if variant else ""


def _shards(index: Path) -> list[Path]:
    """Files named by `*.index.json`, each once."""
    try:
        table = read_json(index).get("weight_map")
    except ValueError as error:
        raise ValueError(f"{index} is not an index of weight files ({one_line(error)})") from error
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise ValueError(f"{index} is not an index of weight files: it needs an object 'weight_map'")
    paths = [index.parent / name for name in dict.fromkeys(table.values())]
    for path in paths:
        if not _PLAIN_FILE.fullmatch(path.name) or path.parent != index.parent:
            raise ValueError(f"{index} names {path}, which is outside its folder")
        if not path.is_file():
            raise ValueError(f"{path} is missing: {index.name} names it as one of {len(paths)} shards")
    return paths


def parts(folder: str | Path) -> dict[str, str]:
    """Parts of a checkpoint and their class names, after its model_index.json. Raises ValueError if that is not one."""
    path = Path(folder) / "model_index.json"
    if not path.exists():
        raise ValueError(f"{path.parent} has no model_index.json: not a checkpoint in the hub's layout")
    index = read_json(path)
    kind = index.get("_class_name", PIPELINES[0])
    if kind not in PIPELINES:
        raise ValueError(f"{path}: _class_name must be one of {', '.join(PIPELINES)}, got {short(kind)}")
    kinds = {}
    for name, entry in index.items():
        if not name.startswith("_") and isinstance(entry, list) and entry != [None, None]:
            if len(entry) != 2 or not all(isinstance(word, str) for word in entry):
                raise ValueError(f"{path}: {short(name)} must be a list of library and class, got {short(entry)}")
            if not _PLAIN_NAME.fullmatch(name):
                raise ValueError(f"{path}: {short(name)} is not the name of a folder in it")
            if name in CLASSES and not CLASSES[name].fullmatch(entry[1]):
                raise ValueError(f"{path}: ldm2 has no {entry[1][:80]!r} for the part {name}")
            kinds[name] = entry[1]
    return kinds


def missing(folder: str | Path, variant: str | None = None) -> str | None:
    """The first thing that a checkpoint lacks, in words; None if it is complete."""
    try:
        kinds = parts(folder)
        if variant and not _has(Path(folder), variant):
            return f"weights of the variant {variant!r}"
        for name, kind in kinds.items():
            part = Path(folder) / name
            if not any(part.glob("*.json")):
                return f"{name}/"
            if not WITHOUT_WEIGHTS.fullmatch(kind):
                weight_files(part, variant)
            elif "Tokenizer" in kind and not any((part / vocabulary).is_file() for vocabulary in VOCABULARIES):
                return f"the vocabulary of {name}/"
    except ValueError as error:
        return str(error)
    return None


def _has(folder: Path, variant: str) -> bool:
    """Whether any part of a checkpoint has weights of this variant."""
    return any(variant in variants(path.name for path in (folder / name).glob("*")) for name in parts(folder))


# Names


def resolve(
    name: str | Path, revision: str | None = None, local_files_only: bool = False, *,
    cache_dir: str | Path | None = None, token: str | bool | None = None, variant: str | None = None,
    force: bool = False,
) -> Path:
    """The checkpoint called `name`: its folder in the hub's layout, or its file if the authors' .pth layout is meant.

    name:     a short name (see `ldm2 models`), a hub name OWNER/MODEL, a folder or a file. Short names go before
              folders of the same name; write ./NAME for those.
    revision: branch, tag or commit; without it the commit in the table of models, or else the main branch.
    variant:  word in the names of the weight files to take, such as "fp16"; parts without it give their plain ones.
    cache_dir, token: of the hub's client; by default HF_HUB_CACHE (or HF_HOME) and HF_TOKEN, or the stored one
    force:    fetch what is in the cache anew

    Raises ValueError or OSError, one line, that says what is missing and what to do.
    """
    name = str(name)
    if not name:
        raise ValueError("the name of the model is empty")
    if "\0" in name:
        raise ValueError(f"{name!r} is neither a name nor a path")
    if re.match(r"\w+://", name):
        raise ValueError(f"{name} is an address: give the hub's name OWNER/MODEL, or download it and give the folder")
    path = home(name)
    if _looks_local(name) or (path.exists() and ("/" in name or known.find(name) is None)):
        if force:
            raise ValueError(f"only what comes from the hub can be downloaded again, {path} is a local path")
        return _local(path, revision, variant)
    model = known.find(name)
    if model is None:
        if "/" not in name:
            raise known.unknown(name)
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise ValueError(f"{name!r} is not a hub name OWNER/MODEL, and there is no such folder")
        model = Model(name, "unknown", "unknown", name)
    if model.layout == "bundled" and (revision is not None or variant is not None or force):
        raise ValueError(f"{name} is part of this package: there is no other revision or variant of it, nor a download")
    found = None if force else find_cached(model, revision, cache_dir=cache_dir, variant=variant)
    if found is not None:
        return found
    if model.layout == "bundled":
        raise FileNotFoundError(f"{BUNDLED / model.name} is missing: this installation of ldm2 is not complete")
    return _fetch(model, revision, local_files_only, cache_dir, token, variant, force)


def home(name: str) -> Path:
    """A path, with ~ or ~user at its start replaced by the home folder. Raises ValueError where there is none."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise ValueError(f"{name}: this user has no home folder here, write the path in full") from None


def commit_of(path: Path) -> str | None:
    """The commit that a path in the hub's cache belongs to; None for any other path."""
    folders = path.parts[path.parts.index("snapshots") + 1:] if "snapshots" in path.parts else ()
    return folders[0] if folders and re.fullmatch("[0-9a-f]{40}", folders[0]) else None


def is_cached(model: Model, cache_dir: str | Path | None = None) -> bool:
    """Whether all files of a model are on this machine. Looks at the disk, never at the network."""
    return find_cached(model, cache_dir=cache_dir) is not None


def _looks_local(name: str) -> bool:
    starts, ends = (".", "/", "~"), (".pth", ".ckpt", ".safetensors", "/")
    return name.startswith(starts) or name.endswith(ends) or name.count("/") > 1 or "\\" in name


def _local(path: Path, revision: str | None, variant: str | None) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if revision is not None:
        raise ValueError(f"a revision ({revision!r}) can be chosen on the hub only, {path} is on this machine")
    if path.is_dir():
        parts(path)
        if variant is not None and not _has(path, variant):
            raise ValueError(f"{path} holds no weights of the variant {variant!r}")
    elif variant is not None:
        raise ValueError(f"a variant ({variant!r}) can be chosen of folders only, {path} is a file")
    return path


# The cache and the hub


def find_cached(
    model: Model, revision: str | None = None, *, cache_dir: str | Path | None = None, variant: str | None = None,
) -> Path | None:
    """Folder (or file) of `model` if all of it is on this machine, otherwise None. Never asks the network."""
    if model.layout == "bundled":
        folder = BUNDLED / model.name
        return folder if missing(folder) is None else None
    for wanted in _revisions(model, revision):
        path = _cached_file(model, wanted, cache_dir)
        if path is not None and (model.file is not None or missing(path.parent, variant) is None):
            return path if model.file is not None else path.parent
    return None


def _revisions(model: Model, revision: str | None) -> list[str]:
    """Revisions to try: the one asked for; else the table's, then the main branch for mirrors that lack that commit."""
    if revision is not None:
        return [revision]
    return ["main"] if model.revision is None else [model.revision, "main"]


def _cached_file(model: Model, revision: str, cache_dir: str | Path | None) -> Path | None:
    """The file that every copy of `model` in the cache starts with, if it is there."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(model.repo, model.file or "model_index.json", cache_dir=cache_dir, revision=revision)
    return Path(path) if isinstance(path, str) else None


def _fetch(
    model: Model, revision: str | None, local_files_only: bool, cache_dir: str | Path | None,
    token: str | bool | None, variant: str | None, force: bool,
) -> Path:
    """Download what the cache lacks of `model`, or all of it. Raises ValueError or OSError, one line: ConnectionError
    without an answer.
    """
    from huggingface_hub import constants, errors

    wanted = _revisions(model, revision)
    if local_files_only or constants.HF_HUB_OFFLINE:
        why = f"downloading is disabled by {'local_files_only' if local_files_only else 'HF_HUB_OFFLINE'}"
        raise FileNotFoundError(f"{_state(model, wanted, cache_dir, variant)}, and {why}: {_way_out(model, revision)}")
    try:
        with named(model.repo, passing=(errors.HTTPError, errors.LocalEntryNotFoundError)):
            return _download(model, wanted, cache_dir, token, variant, force)
    except (errors.LocalEntryNotFoundError, errors.HTTPError) as error:
        cause: BaseException = error
        while isinstance(cause, errors.LocalEntryNotFoundError) and cause.__cause__ is not None:
            cause = cause.__cause__
        refusal = _refusal(cause, model.repo, wanted[-1])
        if refusal is not None:
            raise OSError(refusal) from error
        raise ConnectionError(
            f"{_state(model, wanted, cache_dir, variant)}, and {constants.ENDPOINT} does not answer "
            f"({type(cause).__name__}: {first_line(cause)}): {_way_out(model, revision)}"
        ) from error


def _download(
    model: Model, revisions: list[str], cache_dir: str | Path | None, token: str | bool | None, variant: str | None,
    force: bool,
) -> Path:
    """Fetch the files of `model` that are needed. Small ones come first: where the weights are, all is there."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        """The hub's progress bar, on terminals only."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{"disable": None, **kwargs})

    def fetch(revision: str, names: list[str]) -> Path:
        patterns = [glob.escape(name) for name in names]
        return Path(snapshot_download(
            model.repo, revision=revision, allow_patterns=patterns, cache_dir=cache_dir, token=token, tqdm_class=Bar,
            force_download=force,
        ))

    hub = HfApi(token=token)
    revision = _available(hub, model.repo, revisions)
    size = "" if model.download is None else f" ({model.download / 1e9:.1f} GB)"
    logger.warning("downloading %s%s at revision %s, license %s", model.repo, size, revision, model.license)
    first = model.file or "model_index.json"
    folder = fetch(revision, [first])
    if not (folder / first).is_file():
        raise ValueError(f"{model.repo} has no {first} at revision {revision}: not a checkpoint that ldm2 knows")
    commit = folder.name
    tree = {entry.path: entry for entry in hub.list_repo_tree(model.repo, recursive=True, revision=commit)}
    _check_download(folder, [first], tree, model.name)
    if model.file is not None:
        return folder / first
    for names in needed(tree, parts(folder), variant):
        fetch(commit, names)
        _check_download(folder, names, tree, model.name)
    lack = missing(folder, variant)
    if lack is not None:
        raise ValueError(f"{model.repo} at revision {revision} is not complete, it lacks: {lack}")
    return folder


def _check_download(folder: Path, names: list[str], tree: dict[str, RepoFile | RepoFolder], model: str) -> None:
    """Raise OSError, and let go of the file, if one has not the size or the hash that the hub lists."""
    for name in names:
        file, entry = folder / name, tree.get(name)
        if entry is None or not file.is_file():            # some are optional, and the weights are looked for later
            continue
        size, found = getattr(entry, "size", None), file.stat().st_size
        digest = getattr(getattr(entry, "lfs", None), "sha256", None)
        if size is not None and found != size:
            problem = f"has {found} bytes, the hub lists {size}"
        elif digest is not None and sha256_of(file) != digest:
            problem = "has another SHA-256 than the hub lists"
        else:
            continue
        file.resolve().unlink()                            # else it would pass for complete at the next call
        file.unlink(missing_ok=True)
        raise OSError(f"{name} {problem}: it came damaged and was removed, run `ldm2 download {model}` again")


@contextmanager
def opened(path: Path, name: str | Path) -> Iterator[None]:
    """Around what reads the checkpoint `path`, resolved from `name`: errors are ValueErrors or OSErrors of one line
    that name it, and those of a file in the hub's cache say how to fetch it anew."""
    try:
        with named(path):
            yield
    except ValueError as error:
        if path.parent.name != "snapshots" and path.parent.parent.name != "snapshots":
            raise
        raise ValueError(f"{error}; if the file came damaged: `ldm2 download --force {name}`") from error


def _available(hub: HfApi, repo: str, revisions: list[str]) -> str:
    """The first of the revisions that the hub has. Without network this fails at once, unlike snapshot_download."""
    from huggingface_hub import constants, errors

    for revision in revisions[:-1]:
        try:
            if hub.model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT).sha == revision:
                return revision
        except errors.HfHubHTTPError as error:
            if isinstance(error, errors.RepositoryNotFoundError) or error.response.status_code != 404:
                raise
        logger.info("%s has no commit %s, taking %s", repo, revision, revisions[-1])
    hub.model_info(repo, revision=revisions[-1], timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return revisions[-1]


def needed(files: Iterable[str], kinds: dict[str, str], variant: str | None = None) -> tuple[list[str], list[str]]:
    """Of the paths in a repository those that a checkpoint of these parts needs: (small files, weights).

    `kinds`: class name of each part. No duplicates in other formats or precisions, nothing of other folders.
    """
    small, weights = ["model_index.json", "ldm2.json"], []
    for part, kind in kinds.items():
        names = [path.removeprefix(f"{part}/") for path in files if path.startswith(f"{part}/")]
        names = [name for name in names if "/" not in name]
        small += [f"{part}/{name}" for name in names if name.endswith(SMALL) and ".index." not in name]
        if not WITHOUT_WEIGHTS.fullmatch(kind):
            weights += [f"{part}/{name}" for name in choose_weights(names, variant)]
    return small, weights


# What went wrong, in words


def _state(model: Model, revisions: list[str], cache_dir: str | Path | None, variant: str | None) -> str:
    for revision in revisions:
        path = _cached_file(model, revision, cache_dir)
        if path is not None and model.file is None:
            return f"{model.repo} is only partly in the cache (it lacks: {missing(path.parent, variant)})"
    return f"{model.repo} is not in the cache"


def _way_out(model: Model, revision: str | None) -> str:
    choice = "" if revision is None else f" --revision {revision}"
    return f"when online, run `ldm2 download {model.name}{choice}`"


def _refusal(error: BaseException, repo: str, revision: str) -> str | None:
    """What the hub refused, in one line; None if it did not answer."""
    from huggingface_hub import constants, errors

    sign_in = "set HF_TOKEN or run `hf auth login`"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: accept its terms at {constants.ENDPOINT}/{repo}, then {sign_in}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no model {repo} at {constants.ENDPOINT}, or it is private (then {sign_in})"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}"
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"{constants.ENDPOINT} refuses {repo} (HTTP {error.response.status_code}): {sign_in}"
    return None
