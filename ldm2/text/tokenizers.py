"""Text -> tokens: the tokenizers of checkpoints, which threads may share.

Those of hub folders lie in them. Authors' files hold weights alone: their tokenizers come from a local folder, or from
the hub repositories of the encoders that the models were trained with; then they are fetched when the first prompt is
encoded, so that a file can be opened without a network. The symbols of the speech models are known here.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from ldm2.fields import first_line, one_line, read_json, short

if TYPE_CHECKING:
    import transformers

# Files that each kind needs, one group or another.
VOCABULARIES = {
    "RobertaTokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "T5Tokenizer": (("tokenizer.json",), ("spiece.model",)),
    "VitsTokenizer": (("vocab.json",),),
    "ClapFeatureExtractor": (("preprocessor_config.json",), ("processor_config.json",)),
}
# What each kind makes of "A a", its tokens joined: how words are told apart, and what stands around a text.
READS = {"RobertaTokenizer": "<s>A\u0120a</s>", "T5Tokenizer": "\u2581A\u2581a</s>"}
UNLIMITED = 10**30                         # model_max_length where the files set no limit

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

    kind: str
    folder: str
    repositories: tuple[tuple[str, str], ...]
    max_length: int | None


SOURCES = {
    "clap": Source(
        "RobertaTokenizer", "tokenizer",
        (("laion/clap-htsat-unfused", ""), ("FacebookAI/roberta-base", ""), ("roberta-base", ""),
         ("cvssp/audioldm2", "tokenizer")), 512,
    ),
    "t5": Source(
        "T5Tokenizer", "tokenizer_2",
        (("google/flan-t5-large", ""), ("cvssp/audioldm2", "tokenizer_2")), 128,
    ),
    "phonemes": Source("VitsTokenizer", "tokenizer_2", (), None),            # not fetched: see training_tokenizer
}


class TextTokenizer:
    """A tokenizer of the library `tokenizers` that no call changes, so that threads may share it.

    transformers' own hold truncation and padding as state of the one backend that all threads use; here rows are cut
    and padded by `encoders.tokenize`, and the backend has neither.

    model_max_length: the most tokens of a text, special ones included; pad_token_id: what fills up a row.
    """

    def __init__(self, backend: tokenizers.Tokenizer, model_max_length: int, pad_token_id: int):
        backend.no_truncation()
        backend.no_padding()
        self._backend, self.model_max_length, self.pad_token_id = backend, model_max_length, pad_token_id

    @classmethod
    def of(cls, tokenizer: transformers.PreTrainedTokenizerFast) -> TextTokenizer:
        """One that reads as a tokenizer of transformers does, with a backend of its own."""
        backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        return cls(backend, int(tokenizer.model_max_length), tokenizer.pad_token_id)

    @classmethod
    def from_file(cls, path: Path) -> TextTokenizer:
        """From a tokenizer.json and the tokenizer_config.json beside it. Raises ValueError naming the file."""
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except BaseException as error:                     # nothing more precise, and panics are not even an Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"{path} is no tokenizer ({first_line(error)})") from error
        config = path.with_name("tokenizer_config.json")
        fields = read_json(config) if config.is_file() else {}
        limit = fields.get("model_max_length", fields.get("max_len"))
        numeric = isinstance(limit, (int, float)) and not isinstance(limit, bool)
        if limit is not None and not (numeric and 1 <= limit < float("inf")):
            raise ValueError(f"{config}: model_max_length must be a number of at least 1, got {short(limit)}")
        pad = fields.get("pad_token", "<pad>")
        pad = pad.get("content") if isinstance(pad, dict) else pad
        number = backend.token_to_id(pad) if isinstance(pad, str) else None
        if number is None:
            raise ValueError(f"{path} knows no token {short(pad)}, the pad_token")
        return cls(backend, UNLIMITED if limit is None else int(limit), number)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text with the special tokens around them, of any length."""
        return [self._backend.encode(text).ids for text in texts]

    def tokens(self, text: str) -> list[str]:
        """The tokens of a text as words, special ones included."""
        return self._backend.encode(text).tokens

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self._backend.decode(ids, skip_special_tokens=False)


_loading = threading.Lock()                                # one for all: loading is rare


class LazyTokenizer:
    """A tokenizer of the hub that is read when it is first used. Raises OSError, one line, if it cannot be had."""

    def __init__(self, source: Source, local_files_only: bool = False):
        self.source, self.local_files_only = source, local_files_only
        self.model_max_length = source.max_length
        self.loaded: TextTokenizer | transformers.VitsTokenizer | None = None

    def load(self) -> TextTokenizer | transformers.VitsTokenizer:
        """The tokenizer, from the cache if any of its repositories is there, else from the hub."""
        with _loading:
            if self.loaded is None:
                self.loaded = read(self.source, from_hub(self.source, self.local_files_only))
        return self.loaded

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.load()(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):                           # asked for by copy and pickle, before there is anything
            raise AttributeError(name)
        return getattr(self.load(), name)


def tokenizer(
    encoder: str, folder: str | Path | None = None, local_files_only: bool = False
) -> TextTokenizer | transformers.VitsTokenizer | LazyTokenizer:
    """The tokenizer of an encoder, "clap" or "t5": that of a local folder, read now, or the hub's, later; "phonemes":
    that of the folder, or else that of the training.

    folder: holds the sub-folder `tokenizer` (CLAP) or `tokenizer_2` (T5, phonemes). Raises ValueError naming it.
    """
    source = SOURCES[encoder]
    if folder is None and encoder == "phonemes":
        from ldm2.text.phonemes import training_tokenizer

        return training_tokenizer()
    if folder is None:
        return LazyTokenizer(source, local_files_only)
    return read(source, _local(source, encoder, folder))


def save_tokenizer(encoder: str, folder: str | Path | None, local_files_only: bool, target: Path) -> None:
    """Write the tokenizer of an encoder, as `tokenizer` finds it, into the folder `target` for all who read
    such folders.

    Raises ValueError or OSError if it cannot be had.
    """
    source = SOURCES[encoder]
    if folder is None and encoder == "phonemes":
        loaded: Any = tokenizer(encoder)
    else:
        place = from_hub(source, local_files_only) if folder is None else _local(source, encoder, folder)
        loaded = from_pretrained(source.kind, place)
    if source.max_length is not None:
        loaded.model_max_length = min(loaded.model_max_length, source.max_length)
    loaded.save_pretrained(target)


def _local(source: Source, encoder: str, folder: str | Path) -> Path:
    path = Path(folder) / source.folder
    if not path.is_dir():
        raise ValueError(f"{path} is missing: tokenizers= must be a folder with the tokenizer of {encoder} in it")
    return path


def read(source: Source, folder: Path) -> TextTokenizer | transformers.VitsTokenizer:
    """The tokenizer of a folder, with the limit of its source. Raises ValueError naming the folder."""
    loaded = read_folder(source.kind, folder)
    if source.max_length is not None:                      # unless its own files set a lower limit
        loaded.model_max_length = min(loaded.model_max_length, source.max_length)
    return loaded


def read_folder(kind: str, folder: Path) -> Any:
    """The TextTokenizer, or transformers' VitsTokenizer, of a kind (see VOCABULARIES) in a folder.

    Raises ValueError naming the folder if it is not complete.
    """
    check_complete(kind, folder)
    if kind == "VitsTokenizer":
        return from_pretrained(kind, folder)
    file = folder / "tokenizer.json"
    loaded = TextTokenizer.from_file(file) if file.is_file() else TextTokenizer.of(from_pretrained(kind, folder))
    tokens = loaded.tokens("A a")
    if "".join(tokens) != READS[kind]:
        raise ValueError(f"{folder} holds no {kind}: of 'A a' it makes {short(tokens)}")
    return loaded


def check_complete(kind: str, folder: Path) -> None:
    """Raises ValueError unless a folder holds what its kind needs, and JSON in its JSON files.

    transformers makes a tokenizer without words of a folder without files.
    """
    choices = VOCABULARIES[kind]
    if not any(all((folder / file).is_file() for file in files) for files in choices):
        wanted = " or ".join(" and ".join(files) for files in choices)
        raise ValueError(f"{folder} is not complete: it needs {wanted}")
    for file in folder.glob("*.json"):
        read_json(file)


def from_pretrained(kind: str, folder: Path) -> Any:
    """transformers' object of a kind from a folder. Raises ValueError naming it."""
    import transformers

    check_complete(kind, folder)
    try:
        return getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
    except MemoryError:
        raise
    except Exception as error:                             # of any kind: it takes damaged files for its own mistakes
        raise ValueError(f"{folder} holds no {kind} ({one_line(error)})") from error


def from_hub(source: Source, local_files_only: bool = False) -> Path:
    """The folder of a tokenizer, from the cache or the hub. Raises OSError, one line, that says what to do."""
    attempts = [(*repository, True) for repository in source.repositories]
    if not local_files_only:
        attempts.append((*source.repositories[0], False))
    for repository, subfolder, cached in attempts:
        try:
            folder = _fetch(repository, subfolder, cached)
            check_complete(source.kind, folder)
            return folder
        except (OSError, ValueError) as error:             # the hub client's errors are of these kinds
            reason = error
    repository, subfolder = source.repositories[0]
    raise OSError(
        f"the {source.kind} of {repository} is not in the cache and could not be fetched "
        f"({first_line(reason)}): pass tokenizers=FOLDER with {source.folder}/ in it"
    ) from reason


def _fetch(repository: str, subfolder: str, cached: bool) -> Path:
    """Folder with the tokenizer's files of a repository, from the cache only if `cached`."""
    from huggingface_hub import snapshot_download

    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [f"{prefix}{file}" for file in FILES]
    return Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=cached)) / subfolder
