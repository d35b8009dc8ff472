"""What a generation returns: the sound, every intermediate of it, and how to make it again."""

from __future__ import annotations

import base64
import html
import json
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm2 import __version__, audio
from ldm2.audio import spectrogram
from ldm2.audio.finish import finish
from ldm2.options import options_of, refuse_unknown
from ldm2.settings import Output, Settings, row_settings

if TYPE_CHECKING:
    from torch import Tensor

    from ldm2.runtime.progress import Progress
    from ldm2.stages import Stages


@dataclass(frozen=True, repr=False, eq=False)
class Result:
    """n waveforms, prompt by prompt; within a prompt the best first where candidates were ranked.

    `len(result)` is n, `result[i]` and iteration give results of one waveform each. Results are equal if they are the
    same object: compare their waveforms.

    waveforms:   float32 numpy (n, N) at `sample_rate` Hz, within -1..1: one channel, the mean where there are several
    latents:     (n, C, T/4, F/4), the sampler's output, float32 on the CPU
    mel:         (n, T, F) log-mel, float32 on the CPU
    seeds:       the seed of each waveform
    scores:      CLAP similarity of each waveform with its prompt, or None where nothing was ranked
    settings:    the arguments that make all of it again, with the model, its revision and the version of ldm2
    channels:    what files hold, (n, channels, N): several channels are those of an edit that keeps the format of its
                 input, whose own samples stand in them unchanged (float64 if they are, see audio.read_channels)
    encoding:    of files, where their format has it (see audio.write): that of an edit's input, so that what was kept
                 stays exact
    inputs:      files that `save` does not overwrite, whatever it is asked
    """

    waveforms: np.ndarray
    sample_rate: int
    latents: Tensor
    mel: Tensor
    seeds: list[int]
    scores: list[float] | None
    settings: dict[str, Any]
    channels: np.ndarray | None = None
    encoding: str | None = None
    inputs: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.channels is None:
            object.__setattr__(self, "channels", self.waveforms[:, None])

    def __repr__(self) -> str:
        seconds = self.waveforms.shape[-1] / self.sample_rate
        count = f"{len(self)} waveform{'s' * (len(self) != 1)}"
        return f"Result({count} of {seconds:.2f} s at {self.sample_rate} Hz, {self._about()})"

    def _about(self) -> str:
        """Prompt, model and seeds in a few words."""
        about = {name: self.settings.get(name) for name in ("prompt", "model")} | {"seeds": self.seeds}
        if self.scores is not None:
            about["scores"] = [round(score, 3) for score in self.scores]
        words = ((name, repr(value)) for name, value in about.items() if value is not None)
        return ", ".join(f"{name}={word if len(word) <= 60 else word[:57] + '...'}" for name, word in words)

    def __len__(self) -> int:
        return len(self.waveforms)

    def __iter__(self) -> Iterator[Result]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> Result:
        row = range(len(self))[operator.index(row)]
        return replace(
            self, waveforms=self.waveforms[row : row + 1], latents=self.latents[row : row + 1],
            mel=self.mel[row : row + 1], seeds=[self.seeds[row]],
            scores=None if self.scores is None else [self.scores[row]],
            settings=row_settings(self.settings, row, self.seeds[row]), channels=self.channels[row : row + 1],
        )

    def _repr_html_(self) -> str:
        """A player for each waveform in a notebook, with its spectrogram."""
        return f"<p>{html.escape(repr(self))}</p>" + "".join(map(_player, self))

    def save(self, path: str | Path, overwrite: bool = False, **form: Any) -> list[Path]:
        """Write the waveforms in the format of the suffix, with their settings as a JSON comment inside.

        One waveform goes to `path`; several to name-1.wav, name-2.wav, ... (name-01.wav where there are ten or more):
        all of them are written, or none is. Returns their paths. form: subtype, sample_rate, normalize and trim, see
        ldm2.settings.Output.

        Raises ValueError or OSError (folder missing, file exists or is an input, unknown suffix or option) before
        anything is written.
        """
        output = output_of(form)
        paths = output_paths(Path(path).expanduser(), len(self))
        finished = [finish(one, self.sample_rate, output) for one in self.channels]
        rate = finished[0][1]
        encoding = output.encoding or audio.nearest_encoding(path, self.encoding)
        for target in paths:
            audio.check_output(target, overwrite, sample_rate=rate, channels=self.channels.shape[1], encoding=encoding,
                               inputs=self.inputs)
        audio.write_all(paths, [samples for samples, _ in finished], rate, overwrite, [one._tags(form) for one in self],
                        encoding)
        return paths

    def to_wav(self, **form: Any) -> bytes:
        """The first waveform as a WAV file in memory, as `save` writes it, with its settings. form: as of `save`."""
        output = output_of(form)
        samples, rate = finish(self.channels[0], self.sample_rate, output)
        encoding = output.encoding or audio.nearest_encoding("sound.wav", self.encoding)
        return audio.to_wav(samples, rate, self[0]._tags(form), encoding)

    def _tags(self, form: Mapping[str, Any]) -> dict[str, str]:
        """What a file says of a result of one waveform, which is written as `form` asks."""
        comment = self.settings | ({} if self.scores is None else {"score": self.scores[0]})
        comment |= {"output": dict(form)} if form else {}
        title = self.settings.get("prompt") or self.settings.get("task", "")
        return {"title": title, "software": f"ldm2 {__version__}", "comment": json.dumps(comment)}


def output_of(form: dict[str, Any]) -> Output:
    """The options of `Result.save`. Raises ValueError, and UnknownOption for a name that is none."""
    refuse_unknown("save", form, options_of(Output))
    return Output(**form)


def _player(one: Result) -> str:
    """HTML of a result of one waveform."""
    sound = base64.b64encode(one.to_wav()).decode()
    picture = base64.b64encode(spectrogram.png(one.mel[0].numpy().T)).decode()
    return (f"<figure><img alt=\"log-mel spectrogram\" src=\"data:image/png;base64,{picture}\"><br>"
            f"<audio controls src=\"data:audio/wav;base64,{sound}\"></audio>"
            f"<figcaption>{html.escape(one._about())}</figcaption></figure>")


def collect(
    stages: Stages, settings: Settings, waveforms: np.ndarray, latents: Tensor, mel: Tensor, report: Progress,
    finish: Callable[[np.ndarray], np.ndarray] | None = None, **about: Any,
) -> Result:
    """Rank the candidates of each prompt, if there are several, and put everything together.

    waveforms: (rows, N) at the model's rate, what the candidates are compared by; latents, mel: (rows, ...)
    finish:    finish(waveform (N,)) -> (N,) or (channels, N), what the result holds of it
    about:     more fields of the result: sample_rate, encoding, inputs, and `origin`, more of its settings
    """
    order, scores = stages.best_first(waveforms, settings, report)
    chosen = [waveforms[row] if finish is None else finish(waveforms[row]) for row in order]
    channels = np.stack([np.atleast_2d(waveform) for waveform in chosen])                  # (n, channels, N)
    mono = channels[:, 0] if channels.shape[1] == 1 else channels.mean(axis=1)
    told = settings.plain() | stages.origin | {"ldm2": __version__} | about.pop("origin", {})
    return Result(
        waveforms=mono.astype(np.float32), latents=latents[order].float().cpu(), mel=mel[order, 0].float().cpu(),
        seeds=[settings.seeds[row] for row in order], scores=scores, settings=told, channels=channels,
        **{"sample_rate": stages.sample_rate} | about,
    )


def output_paths(path: str | Path, count: int) -> list[Path]:
    """The file names of `count` waveforms saved to `path`, numbered so that they sort."""
    path = Path(path)
    if count == 1:
        return [path]
    digits = len(str(count))
    return [path.with_name(f"{path.stem}-{i:0{digits}}{path.suffix}") for i in range(1, count + 1)]
