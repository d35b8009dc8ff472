"""Rows -> sounds with one model, those of equal shape together: what a batch and a server have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from ldm2.batch.rows import Row, canonical
from ldm2.call import Call
from ldm2.conditioning import Conditioning
from ldm2.pipeline import AudioLDM2
from ldm2.result import Result
from ldm2.runtime.inference import inference
from ldm2.runtime.memory import out_of_memory
from ldm2.runtime.progress import Progress, silent
from ldm2.samplers import Cancelled
from ldm2.settings import GENERATE, PER_PROMPT, Settings

SECONDS_AT_ONCE = {"cpu": 40.0, "cuda": 640.0}             # of sound in one run, with batch=0
ROWS_AT_ONCE = {"cpu": 8, "cuda": 64}
_TEXTS = 1024                              # conditionings that are kept


class Maker:
    """Makes the sounds of rows. A row has the same sound in any company, up to rounding.

    batch: rows that run together at most; 0 finds a size
    """

    def __init__(self, pipe: AudioLDM2, batch: int = 0):
        self.pipe, self.batch = pipe, batch
        self.stopped: Callable[[], bool] = lambda: False   # asked after each step; True ends the run with Cancelled
        self.progress: Progress = silent                   # of each run
        self._fits: dict[str, int] = {}                    # by group: what has been found by running out of memory
        self._conditionings: dict[tuple, tuple[Conditioning, Conditioning | None]] = {}

    def groups(self, rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
        """Rows that can run together, each group with its name."""
        found: dict[str, list[Row]] = {}
        for row in rows:
            found.setdefault(group_of(row), []).append(row)
        yield from found.items()

    def made(self, group: str, rows: Sequence[Row]) -> Iterator[tuple[Row, Result | Exception, float]]:
        """Each row of a group with its sounds, or why there are none, and its share of the time in ms.

        Raises Cancelled.
        """
        waiting = list(rows)
        size = min(self.size(rows[0]), self._fits.get(group, len(rows)))
        while waiting:
            taken, start = waiting[:size], time.perf_counter()
            try:
                results = self.results(taken)
            except Cancelled:
                raise
            except Exception as error:                     # whatever a row does must not end the job
                if len(taken) == 1:
                    yield taken[0], error, 1e3 * (time.perf_counter() - start)
                    del waiting[:1]
                elif out_of_memory(error):
                    self._fits[group] = size = max(1, len(taken) // 2)
                    torch.cuda.empty_cache()
                else:                                      # one of them is to blame
                    for row in taken:
                        yield from self.made(row.id, [row])
                    del waiting[:size]
                continue
            spent = 1e3 * (time.perf_counter() - start) / len(taken)
            yield from ((row, result, spent) for row, result in zip(taken, results))
            del waiting[:size]

    def size(self, row: Row) -> int:
        """How many rows like this one run together."""
        return self.batch or rows_at_once(row, self.pipe.device.type, self.pipe.defaults)

    def results(self, rows: Sequence[Row]) -> list[Result]:
        """The sounds of rows of one group: all candidates of a row, best first. Raises what making them raises."""
        options = dict(rows[0].options)
        task = options.pop("task")
        options |= {"callback": lambda step, total, latents: not self.stopped(), "progress": self._report}
        if task != GENERATE:
            return [getattr(self.pipe, task)(rows[0].input, **options)]
        if len(rows) == 1 and (options.get("prompt_at") or options.get("num_waveforms", 1) > 1):
            return [self.pipe.generate(**options)]
        for name in (*PER_PROMPT, "seed"):
            if name in options:
                options[name] = [row.options[name] for row in rows]
        return list(self.pipe.run(Call.of(GENERATE, self.pipe.origin, **options), self._encoded))

    def _report(self, stage: str, done: int, total: int) -> None:
        """What a run says while it works."""
        self.progress(stage, done, total)
        if self.stopped():
            raise Cancelled(f"stopped while {stage}")

    @inference
    def _encoded(self, settings: Settings) -> tuple[Conditioning, Conditioning | None]:
        """Both sides of guidance for prompts that are encoded each alone, and once."""
        texts = {name: settings.each(name) or [None] * len(settings.prompts) for name in PER_PROMPT}
        pairs = [self._encoded_alone((settings.guided, settings.lora), **dict(zip(texts, each)))
                 for each in zip(*texts.values())]
        if len(pairs) == 1:
            return pairs[0]
        other = Conditioning.join([pair[1] for pair in pairs]) if settings.guided else None
        return Conditioning.join([pair[0] for pair in pairs]), other

    def _encoded_alone(
        self, how: tuple[bool, object], prompt: str, negative_prompt: str | None, **speech: str | None
    ) -> tuple[Conditioning, Conditioning | None]:
        """Both sides of guidance for one prompt. how: whether it is guided, and the LoRAs that hold."""
        key = (how, prompt, negative_prompt, *speech.values())
        if key not in self._conditionings:
            if len(self._conditionings) >= _TEXTS:
                self._conditionings.pop(next(iter(self._conditionings)))
            one = self.pipe.encode([prompt], **speech)
            other = self.pipe.encode_unconditional(one, negative_prompt, **speech) if how[0] else None
            self._conditionings[key] = one, other
        return self._conditionings[key]


def group_of(row: Row) -> str:
    """A name for the rows that can run together with this one."""
    options = row.options
    if options["task"] != GENERATE or options.get("prompt_at") or options.get("num_waveforms", 1) > 1:
        return row.id
    shape = {name: value for name, value in options.items() if name not in (*PER_PROMPT, "seed")}
    return canonical([shape, [name for name in PER_PROMPT if name in options]])


def rows_at_once(row: Row, device: str, defaults: Mapping[str, object]) -> int:
    """How many rows like this one run together on a kind of device, with a checkpoint's own defaults."""
    kind = "cuda" if device == "cuda" else "cpu"
    seconds = Settings(**row.options).resolved(defaults, duration=float("inf")).seconds or 10.0
    return max(1, min(ROWS_AT_ONCE[kind], int(SECONDS_AT_ONCE[kind] / seconds)))
