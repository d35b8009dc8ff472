"""One description of a request: every option once, with its type, its default, its limits and its help text.

The Python functions, the command line and the settings inside sound files are all made from the fields below. To add an
option, add a field here and use it where it acts. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from os import PathLike
from typing import Any, Self

from ldm2.option_kinds import NUM_SEEDS, Range, interval, loras, normalization, prompt_changes, ranges, seeds, texts
from ldm2.options import (
    check_options,
    choice,
    default_value,
    exact,
    flag,
    integer,
    number,
    option,
    options_of,
    refuse_unknown,
)

GENERATE, TRANSFER, VARIATIONS, INPAINT, EXTEND, SUPER_RESOLUTION, RECONSTRUCT = TASKS = (
    "generate", "transfer", "variations", "inpaint", "extend", "super_resolution", "reconstruct",
)
EDITS = TASKS[1:]
RESULTS = TASKS[:-1]                       # the tasks that return a Result: candidates, and prompts over time
NOISED = (TRANSFER, VARIATIONS, RECONSTRUCT)
KEEPING = (INPAINT, EXTEND, SUPER_RESOLUTION)

SAMPLERS = ("ddim", "ddpm", "pndm", "lms", "euler", "euler-ancestral", "heun", "dpmpp-2m", "dpmpp-2m-sde", "unipc",
            "lcm")
SPACINGS = ("leading", "trailing", "linspace")
SIDES = ("after", "before", "both")
STAGES = ("vocoder", "vae", "diffusion")
MAX_SECONDS = 600.0
MAX_WAVEFORMS = 10_000
CROSSFADE_SECONDS = 0.02

INSTANT = "instant"                        # the preset, and the LoRA that a model has for it
# Values for what is not given, by one name; `python -m benchmarks.tradeoff` measures their price.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"steps": 12, "sampler": "dpmpp-2m", "spacing": "trailing"},
    INSTANT: {"steps": 4, "sampler": "ddim", "guidance_scale": 1.0, "spacing": "trailing", "lora": ((INSTANT, 1.0),)},
}
# Encodings of samples in files, by the names that libsndfile has for them.
SUBTYPES = {"PCM_16": "pcm16", "PCM_24": "pcm24", "PCM_32": "pcm32", "FLOAT": "float32", "DOUBLE": "float64"}
PER_PROMPT = ("prompt", "negative_prompt", "transcription", "phonemes")
# What files say beside the options: where a sound comes from, and how it was written.
ORIGIN = ("model", "revision", "reference", "dtype", "device", "torch", "ldm2", "input", "input_sha256", "score",
          "output")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the diffusion runs: what `AudioLDM2.denoise` needs to know.

    None stands for the preset's value, or else the checkpoint's, or else the default: see `resolved`. Raises ValueError
    naming option, value and rule.
    """

    preset: str | None = option(
        choice(tuple(PRESETS)), "defaults for options that are not given: fast is "
        f"{PRESETS['fast']['sampler']} in {PRESETS['fast']['steps']} steps, trailing; instant is ddim in 4 steps, "
        "trailing, without guidance, by the model's LoRA instant (`ldm2 train distill` makes one)", metavar="NAME")
    steps: int | None = option(
        integer(1), "sampler steps", default=200, of_checkpoint=True, foreign=("num_inference_steps", "ddim_steps"))
    guidance_scale: float | None = option(
        number(), "how strictly to follow the prompt (classifier-free guidance, arXiv:2207.12598); 1 or less: not at "
        "all", default=3.5, of_checkpoint=True, metavar="SCALE", foreign=("cfg_scale", "guidance"))
    guidance_interval: tuple[float, float] | None = option(
        interval(), "guidance in this part of the run only, which goes from 0 (noise) to 1 (sound), for example "
        "0.1:0.8 (arXiv:2404.07724); other steps cost half", default=(0.0, 1.0), metavar="FROM:TO")
    guidance_rescale: float = option(
        number(0, 1), "how far to bring the guided prediction back to the deviation of the prompt's own, 0 to 1, for "
        "sound that high guidance scales overdrive (arXiv:2305.08891, section 3.4)", value=0.0, metavar="PHI")
    sampler: str | None = option(
        choice(SAMPLERS), f"one of: {', '.join(SAMPLERS)}", default="ddim", of_checkpoint=True, metavar="NAME",
        foreign=("scheduler",))
    eta: float = option(
        number(0, 1), "DDIM's eta: 0 is deterministic, 1 is as random as DDPM", value=0.0)
    spacing: str | None = option(
        choice(SPACINGS), "spacing of the timesteps: leading, trailing (starts at the last timestep of the "
        "training, which leading misses, by more the fewer the steps) or linspace (arXiv:2305.08891, table 2); lcm has "
        "its own",
        of_checkpoint=True, metavar="NAME", foreign=("timestep_spacing",))
    cache_interval: int | None = option(
        integer(1), "compute the deep part of the UNet in every N-th step and reuse it in between (DeepCache, "
        "arXiv:2312.00858): faster and less exact", default=1, metavar="N", words=("reuse",))

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def guided(self) -> bool:
        """Whether guidance needs an unconditional branch: a scale of 1 or less is the conditional prediction alone."""
        return self.guidance_scale is None or self.guidance_scale > 1

    def _filled(self, defaults: Mapping[str, Any], task: str) -> dict[str, Any]:
        """The values of the options that are None, as far as there are defaults for them."""
        chosen = {name: each.default_for(task) for name, each in options_of(type(self), task).items()}
        chosen |= {name: value for name, value in defaults.items() if name in chosen}
        chosen |= {name: values for name, values in PRESETS.get(self.preset or "", {}).items() if name in chosen}
        return {name: value for name, value in chosen.items() if value is not None and getattr(self, name) is None}

    def resolved(self, defaults: Mapping[str, Any] | None = None) -> Self:
        """These settings with the preset and the defaults filled in; `defaults` are a checkpoint's own.

        Raises ValueError for values that do not go together.
        """
        settings = replace(self, **self._filled(defaults or {}, GENERATE), preset=None)
        settings._check_eta()
        return settings

    def _check_eta(self) -> None:
        if self.eta > 0 and self.sampler != "ddim":
            raise ValueError(f"only the sampler ddim takes an eta above 0, got eta {self.eta:g} with {self.sampler}")


@dataclass(frozen=True)
class Settings(Sampling):
    """A request: a sound to make, or an edit of a sound. With the model it is all that makes a sound again.

    Waveforms are ordered prompt by prompt: candidate j of prompt i is row i * num_waveforms + j.
    """

    prompt: str | Sequence[str] | None = option(
        texts(), "what to hear, for example \"a dog barking in the rain\"", group="prompt", foreign=("text",))
    negative_prompt: str | Sequence[str] | None = option(
        texts(may_be_empty=True), "what to steer away from", metavar="TEXT")
    _: KW_ONLY
    lora: Sequence[str | tuple[Any, ...]] | None = option(
        loras(), "a LoRA that changes the model for this sound, and how much it counts, for example "
        "rain.safetensors:0.8; a file, a folder, or the name of one that the model brings; may be repeated",
        metavar="FILE[:SCALE]", foreign=("loras", "lora_path", "adapter"))
    task: str = option(choice(TASKS), "what to do", value=GENERATE, group="task")
    seconds: float | None = option(
        number(above=0, maximum=MAX_SECONDS, unit="seconds"), "length of the sound; of extend, how much to add",
        group="sound", default=10.24, of_checkpoint=True, per_task={EXTEND: 10.0}, tasks=(GENERATE, EXTEND),
        foreign=("audio_length_in_s", "duration", "audio_length"))
    seed: int | Sequence[int] | None = option(
        seeds(), "number that fixes the noise: row i takes seed + i (default: drawn, and printed)",
        foreign=("generator",))
    num_waveforms: int | None = option(
        integer(1, MAX_WAVEFORMS), "candidates of each prompt, best first by CLAP similarity with it", default=1,
        per_task={VARIATIONS: 3}, tasks=RESULTS, metavar="N",
        foreign=("num_waveforms_per_prompt", "n_candidate_gen_per_text", "n_candidates"))
    transcription: str | Sequence[str] | None = option(
        texts(), "what a speech model says, in English; needs phonemizer and espeak-ng", group="speech models",
        metavar="TEXT")
    phonemes: str | Sequence[str] | None = option(
        texts(), "the same as ready phonemes, which need neither", group="speech models", metavar="IPA")
    window: float | None = option(
        number(0.001, unit="seconds"), "longer sounds are made in overlapping windows of this length in seconds "
        "(MultiDiffusion, arXiv:2302.08113) (default: the length that the model was trained on)", group="long sound",
        metavar="SECONDS")
    overlap: float | None = option(
        number(0, unit="seconds"), "what neighboring windows share, in seconds (default: a quarter of a window)",
        group="long sound", metavar="SECONDS")
    loop: bool = option(
        flag(), "make a seamless loop: the end continues at the start; the length is rounded to whole latent frames "
        "(0.04 s at 16 kHz)", value=False, group="long sound", tasks=(GENERATE,))
    prompt_at: Sequence[tuple[float, str]] = option(
        prompt_changes(), "from this time on the sound follows another prompt; may be repeated", value=(),
        group="long sound", tasks=RESULTS, metavar="SECONDS:PROMPT")
    strength: float | None = option(
        number(0, 1), "0 keeps the input, as the model reconstructs it; 1 ignores it (SDEdit, arXiv:2108.01073)",
        group="edit", per_task={TRANSFER: 0.6, VARIATIONS: 0.5, RECONSTRUCT: 0.3}, tasks=NOISED)
    stage: str | None = option(
        choice(STAGES), "how far in: vocoder (mel and back), vae (latents and back) or diffusion (noised to the "
        "strength and denoised)", group="edit", default="vae", tasks=(RECONSTRUCT,))
    times: Sequence[Range] | None = option(
        ranges(), "seconds to regenerate, for example 2.5:4, 3: or :3; may be repeated", group="edit",
        tasks=(INPAINT,), flag="--time", metavar="FROM:TO")
    bands: Sequence[Range] | None = option(
        ranges(), "Hz to regenerate, within the times if both are given; may be repeated", group="edit",
        tasks=(INPAINT,), flag="--band", metavar="FROM:TO")
    soft_seconds: float = option(
        number(0, unit="seconds"), "let the change set in over this time, inside each border of a time", value=0.0,
        group="edit", tasks=(INPAINT,), metavar="S")
    above: float | None = option(
        number(0, unit="Hz"), "regenerate everything above this frequency, for example 4000; what lies beyond the "
        "model's own range stays as it is", group="edit", tasks=(SUPER_RESOLUTION,), metavar="HZ")
    soft_hz: float = option(
        number(0, unit="Hz"), "let the change set in over this width, inside each border of a band", value=0.0,
        group="edit", tasks=(INPAINT, SUPER_RESOLUTION), metavar="HZ")
    side: str | None = option(
        choice(SIDES), "after, before, or both, then as many seconds on each side", group="edit", default="after",
        tasks=(EXTEND,))
    crossfade: float | None = option(
        number(0, unit="seconds"), "seconds over which input and new sound fade into each other", group="edit",
        default=CROSSFADE_SECONDS, tasks=(INPAINT, EXTEND), metavar="S")
    paste: bool = option(
        flag(), "return what the model makes of everything, instead of the input's own samples where nothing was to "
        "change", value=True, group="edit", tasks=KEEPING, flag="--no-paste")
    channel: int | None = option(
        integer(0), "index of the channel that the model hears, from 0 (default: the mean of all)", group="edit",
        tasks=EDITS, metavar="N")
    keep_format: bool = option(
        flag(), "return the input's own rate and channels, what is new alike in all of them (default: one channel at "
        "the model's rate)", value=False, group="edit", tasks=EDITS[:-1])

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self._given():
            if not options_of(Settings)[name].applies_to(self.task):
                raise ValueError(f"{self.task} takes no {name}, got {getattr(self, name)!r}")

    @classmethod
    def create(cls, task: str, /, *args: Any, **options: Any) -> Self:
        """Settings of a task from arguments as its function takes them; older names of options are accepted.

        Raises UnknownOption (a TypeError and a ValueError) for a name that is no option of the task.
        """
        known = options_of(cls, task)
        ours = {word: name for name, each in known.items() for word in each.words}
        options = {ours.get(name, name): value for name, value in options.items()}
        refuse_unknown(task, options, known, cls.beside(task))
        if options.pop("task", task) != task:
            raise ValueError(f"these are settings of another task than {task}")
        return cls(*args, task=task, **options)

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> Self:
        """The settings in a sound file that ldm2 wrote, or in a file .json or .toml with options by their names.

        What such a file says of its origin (see ORIGIN) is left out. Raises ValueError or OSError, one line with the
        path, for a file without settings and for a wrong name or value.
        """
        from ldm2.audio.recorded import read

        told = read(path)
        options = {name: value for name, value in told.items() if name not in ORIGIN}
        try:
            task = options_of(cls)["task"].kind.check("task", options.pop("task", GENERATE))
            return cls.create(task, **options)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def beside(cls, task: str) -> list[str]:
        """The names of fields that are no options, of the tasks in their metadata."""
        return [each.name for each in dataclasses.fields(cls) if task in each.metadata.get("tasks", ())]

    def _given(self) -> list[str]:
        """The options with another value than that of the field itself."""
        return [name for name in options_of(type(self)) if getattr(self, name) != default_value(type(self), name)]

    def resolved(self, defaults: Mapping[str, Any] | None = None, *, duration: float | None = None) -> Self:
        """These settings with preset, defaults and a seed for each row filled in, checked against each other.

        defaults: a checkpoint's own values. duration: of the sound in seconds, where an input sets it (see `length`).

        Raises ValueError for values that do not go together, and where a prompt is needed and none is given.
        """
        if self.prompt is None and self.task == GENERATE:
            raise ValueError("a prompt is needed")
        self._check_ignored()
        filled = self._filled(defaults or {}, self.task)
        if self.prompt is None:
            self._check_unprompted()
            filled["guidance_scale"] = 1.0 if self.guidance_scale is None else self.guidance_scale
        settings = replace(self, **filled, preset=None)
        rows = max(1, len(settings.prompts)) * settings.candidates
        settings = replace(settings, seed=row_seeds(settings.seed, rows))
        settings._check_eta()
        settings._check_texts()
        settings._check_task()
        duration = settings.seconds if duration is None and self.task == GENERATE else duration
        if duration is not None and settings.prompt_at and settings.prompt_at[-1][0] >= duration:
            start = settings.prompt_at[-1][0]
            raise ValueError(f"prompt_at must lie inside the {exact(duration)} seconds of sound, got {exact(start)}")
        return settings

    def length(self, duration: float = 0.0) -> float:
        """The seconds of sound that resolved settings make of an input of `duration` seconds."""
        added = self.seconds if self.task in (GENERATE, EXTEND) else 0.0
        return duration + (added or 0.0) * (2 if self.task == EXTEND and self.side == "both" else 1)

    def _check_unprompted(self) -> None:
        """Without a prompt nothing is guided."""
        for name in ("negative_prompt", "prompt_at", "transcription", "phonemes"):
            if getattr(self, name):
                raise ValueError(f"{name} {getattr(self, name)!r} needs a prompt: without one there is no guidance")
        if self.guidance_scale is not None and self.guidance_scale > 1:
            raise ValueError(f"guidance_scale {self.guidance_scale:g} needs a prompt: without one there is no guidance")

    def _check_texts(self) -> None:
        """One text for all prompts, or one for each."""
        for name in PER_PROMPT[1:]:
            count = 1 if getattr(self, name) is None else len(getattr(self, name))
            if count not in (1, len(self.prompts)):
                raise ValueError(f"{name} must be one text for all prompts or one for each of {len(self.prompts)}, "
                                 f"got {count}")

    def _check_task(self) -> None:
        """What a task needs, and what it does not look at."""
        if self.task == INPAINT and self.times is None and self.bands is None:
            raise ValueError("nothing to regenerate: give times (seconds), bands (Hz) or both")
        if self.task == SUPER_RESOLUTION and self.above is None:
            raise ValueError("super_resolution needs above, the frequency in Hz from which on to regenerate")

    def _check_ignored(self) -> None:
        """Reconstruction samples nothing in its stages vocoder and vae: refuse what they would not look at."""
        if self.task == RECONSTRUCT and self.stage in (None, "vocoder", "vae"):
            for name in self._given():
                if name not in ("task", "stage", "channel"):
                    raise ValueError(f"{name} is for the stage diffusion, got {getattr(self, name)!r} with the stage "
                                     f"{self.stage or 'vae'}")

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts; none where nothing but the input guides an edit."""
        return tuple(self.prompt or ())

    @property
    def candidates(self) -> int:
        """The number of waveforms of each prompt."""
        return self.num_waveforms or 1

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each row of resolved settings."""
        assert isinstance(self.seed, tuple)
        return self.seed

    def each(self, name: str) -> list[str] | None:
        """The texts of an option in PER_PROMPT, one for each prompt (one without a prompt), or None."""
        given = getattr(self, name)
        count = max(1, len(self.prompts))
        return None if given is None else list(given) * (count if len(given) == 1 else 1)

    def plain(self) -> dict[str, Any]:
        """The options of a task as JSON has them; `Settings.create` and `resolved` make the same settings of them."""
        known = options_of(type(self), self.task)
        return {name: _plain(name, getattr(self, name)) for name in known if name != "preset"}


@dataclass(frozen=True, kw_only=True)
class Output:
    """How a sound is written; what is not given changes nothing. Raises ValueError naming option, value and rule."""

    subtype: str | None = option(
        choice(tuple(SUBTYPES)), f"samples of WAV and FLAC files: {', '.join(SUBTYPES)} (default: PCM_16, or the "
        "precision of an edit's input)", group="output", metavar="NAME")
    sample_rate: int | None = option(
        integer(1), "resample to this rate in Hz (default: the model's)", group="output", metavar="HZ")
    normalize: float | str | None = option(
        normalization(), "peak, or a loudness in LUFS (ITU-R BS.1770) such as -16 (default: as the model made it)",
        group="output", metavar="LEVEL")
    trim: bool = option(flag(), "cut silence (below -60 dB) from both ends", value=False, group="output")

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def encoding(self) -> str | None:
        """The name of the subtype in ldm2.audio."""
        return None if self.subtype is None else SUBTYPES[self.subtype]


def row_seeds(seed: int | Sequence[int] | None, rows: int) -> tuple[int, ...]:
    """The seed of each row, from 0 to 2**64 - 1: one number counts on from row to row, None draws one.

    A negative seed means what torch makes of it: -1 is 2**64 - 1. Raises ValueError.
    """
    seed = secrets.randbelow(2**31) if seed is None else seeds().check("seed", seed)
    if isinstance(seed, int):
        return tuple((seed + row) % NUM_SEEDS for row in range(rows))
    if len(seed) != rows:
        raise ValueError(f"seed must be one number or one for each of {rows} waveforms, got {len(seed)}")
    return seed


def row_settings(settings: Mapping[str, Any], row: int, seed: int) -> dict[str, Any]:
    """The settings that make one row of a call again, alone: its own prompts and the seed that the row ended with.

    settings: as `Settings.plain` returns them; more names in it stay.
    """
    index = row // settings.get("num_waveforms", 1)
    own = {name: settings[name][index] for name in PER_PROMPT if isinstance(settings.get(name), list)}
    alone = {"num_waveforms": 1} if "num_waveforms" in settings else {}
    return {**settings, **own, **alone, "seed": seed}


def _plain(name: str, value: Any) -> Any:
    """A value as JSON has it; what may be one or several is one where there is one."""
    if isinstance(value, tuple):
        if len(value) == 1 and name in (*PER_PROMPT, "seed"):
            return value[0]
        return [_plain("", each) for each in value]
    return value
