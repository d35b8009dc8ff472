"""Find a checkpoint: in a folder, in the hub's cache, or on the hub. Imports no torch, and the hub client when needed.

Everything goes through huggingface_hub and its cache, so HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and
HF_HUB_OFFLINE count. A checkpoint that is complete in the cache is used without any request.
"""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ldm2.checkpoints import known
from ldm2.checkpoints.hub_folder import has_variant, missing, needed, parts
from ldm2.checkpoints.known import Model
from ldm2.fields import first_line, named, sha256_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile, RepoFolder

logger = logging.getLogger(__name__)

BUNDLED = Path(__file__).parents[1]                          # folders of the checkpoints that travel with this package


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
    model = _on_hub(name)
    if model.layout == "bundled" and (revision is not None or variant is not None or force):
        raise ValueError(f"{name} is part of this package: there is no other revision or variant of it, nor a download")
    found = None if force else find_cached(model, revision, cache_dir=cache_dir, variant=variant)
    if found is not None:
        return found
    if model.layout == "bundled":
        raise FileNotFoundError(f"{BUNDLED / model.name} is missing: this installation of ldm2 is not complete")
    return _fetch(model, revision, local_files_only, cache_dir, token, variant, force)


def _on_hub(name: str) -> Model:
    """The known checkpoint of a name, or the repository that it stands for. Raises ValueError."""
    model = known.find(name)
    if model is not None:
        return model
    if "/" not in name:
        raise known.unknown(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"{name!r} is not a hub name OWNER/MODEL, and there is no such folder")
    return Model(name, "unknown", "unknown", name)


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
        if variant is not None and not has_variant(path, variant):
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
