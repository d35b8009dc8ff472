"""The tokenizers of the authors' checkpoints, whose files hold weights alone.

They come from a local folder, or from the hub repositories of the encoders that the models were trained with; then they
are fetched when the first prompt is encoded, so that a file can be opened without a network.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from ldm2.text import VOCABULARIES

Tokenizer = transformers.PreTrainedTokenizerBase

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "spiece.model",
)


@dataclass(frozen=True)
class Source:
    """Where a tokenizer is found, and how many tokens of a text the models were trained to see.

    folder: its sub-folder in a folder in the hub's layout; repositories: (name, sub-folder), the first is fetched,
    any other will do where it is in the cache.
    """

    kind: type[Tokenizer]
    folder: str
    repositories: tuple[tuple[str, str], ...]
    max_length: int | None


SOURCES = {
    "clap": Source(
        transformers.RobertaTokenizer, "tokenizer",
        (("laion/clap-htsat-unfused", ""), ("FacebookAI/roberta-base", ""), ("roberta-base", ""),
         ("cvssp/audioldm2", "tokenizer")), 512,
    ),
    "t5": Source(
        transformers.T5Tokenizer, "tokenizer_2",
        (("google/flan-t5-large", ""), ("cvssp/audioldm2", "tokenizer_2")), 128,
    ),
    "phonemes": Source(
        transformers.VitsTokenizer, "tokenizer_2",
        (("anhnct/audioldm2_gigaspeech", "tokenizer_2"), ("anhnct/audioldm2_ljspeech", "tokenizer_2")), None,
    ),
}


class LazyTokenizer:
    """A tokenizer of the hub that is read when it is first used. Raises OSError, one line, if it cannot be had."""

    def __init__(self, source: Source, local_files_only: bool = False):
        self.source, self.local_files_only = source, local_files_only
        self.model_max_length = source.max_length
        self.loaded: Tokenizer | None = None

    def load(self) -> Tokenizer:
        """The tokenizer, from the cache if any of its repositories is there, else from the hub."""
        if self.loaded is None:
            self.loaded = from_hub(self.source, self.local_files_only)
        return self.loaded

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.load()(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):                           # asked for by copy and pickle, before there is anything
            raise AttributeError(name)
        return getattr(self.load(), name)


def tokenizer(
    encoder: str, folder: str | Path | None = None, local_files_only: bool = False
) -> Tokenizer | LazyTokenizer:
    """The tokenizer of an encoder, "clap", "t5" or "phonemes": that of a local folder, read now, or the hub's, later.

    folder: holds the sub-folder `tokenizer` (CLAP) or `tokenizer_2` (T5, phonemes). Raises ValueError naming it.
    """
    source = SOURCES[encoder]
    if folder is None:
        return LazyTokenizer(source, local_files_only)
    path = Path(folder) / source.folder
    if not path.is_dir():
        raise ValueError(f"{path} is missing: tokenizers= must be a folder with the tokenizer of {encoder} in it")
    return read(source, path)


def read(source: Source, folder: Path) -> Tokenizer:
    """The tokenizer of a folder. Raises ValueError naming it if it is not complete."""
    # transformers makes a tokenizer without words of a folder without files, so they are looked for first.
    choices = VOCABULARIES[source.kind.__name__]
    if not any(all((folder / file).is_file() for file in files) for files in choices):
        wanted = " or ".join(" and ".join(files) for files in choices)
        raise ValueError(f"{folder} is not complete: it needs {wanted}")
    try:
        loaded = source.kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ImportError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder} holds no {source.kind.__name__} ({_first_line(error)})") from error
    if source.max_length is not None:                      # unless its own files set a lower limit
        loaded.model_max_length = min(loaded.model_max_length, source.max_length)
    return loaded


def from_hub(source: Source, local_files_only: bool = False) -> Tokenizer:
    """The tokenizer from the cache or the hub. Raises OSError, one line, that says what to do."""
    attempts = [(*repository, True) for repository in source.repositories]
    if not local_files_only:
        attempts.append((*source.repositories[0], False))
    for repository, subfolder, cached in attempts:
        try:
            return read(source, _fetch(repository, subfolder, cached))
        except (OSError, ValueError) as error:             # the hub client's errors are of these kinds
            reason = error
    repository, subfolder = source.repositories[0]
    raise OSError(
        f"the {source.kind.__name__} of {repository} is not in the cache and could not be fetched "
        f"({_first_line(reason)}): pass tokenizers=FOLDER with {source.folder}/ in it"
    ) from reason


def _fetch(repository: str, subfolder: str, cached: bool) -> Path:
    """Folder with the tokenizer's files of a repository, from the cache only if `cached`."""
    from huggingface_hub import snapshot_download

    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [f"{prefix}{file}" for file in FILES]
    return Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=cached)) / subfolder


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
