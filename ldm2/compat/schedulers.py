"""diffusers' scheduler classes by name and config: which sampler and which noise schedule a pipeline takes.

They say how to sample; the steps themselves are in `ldm2.samplers`. Those of diffusers may be assigned as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ldm2 import samplers
from ldm2.checkpoints import hub
from ldm2.compat.parts import Config
from ldm2.samplers.core import variance_preserving
from ldm2.schedules import Schedule

_DEFAULTS = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
FILE = "scheduler_config.json"


class Scheduler:
    """What the classes below share. `config` holds every argument, by attribute and by key.

    Raises ValueError naming option and value for what is impossible or not implemented.
    """

    sampler: ClassVar[str]
    order: ClassVar[int] = 1
    defaults: ClassVar[Mapping[str, object]] = _DEFAULTS

    def __init__(self, **options: object):
        name = type(self).__name__
        self.config = Config({**self.defaults, **options, "_class_name": name})
        self.schedule = Schedule.from_dict(self.config, source=name)
        self.timesteps = torch.arange(self.schedule.num_train_timesteps - 1, -1, -1, device="cpu")
        self._steps: int | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.config, indent=2, default=str)}"

    @classmethod
    def from_config(cls, config: Mapping[str, object], **options: object) -> Scheduler:
        """One with the options of another's config, and some of its own."""
        return cls(**{name: value for name, value in config.items() if not name.startswith("_")} | options)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike, subfolder: str = "", *, revision: str | None = None,
        local_files_only: bool = False, cache_dir: str | PathLike | None = None, token: str | bool | None = None,
        **options: object,
    ) -> Scheduler:
        """One with the options of a checkpoint's scheduler_config.json: a folder, or a hub name and "scheduler"."""
        folder = Path(pretrained_model_name_or_path) / subfolder
        if not (folder / FILE).is_file():
            root = hub.resolve(str(pretrained_model_name_or_path), revision, local_files_only, cache_dir=cache_dir,
                               token=token)
            folder = root / (subfolder or "scheduler")
        try:
            config = json.loads((folder / FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{folder} has no {FILE}") from None
        return cls.from_config(config, **options)

    def save_pretrained(self, save_directory: str | PathLike, **_: object) -> None:
        """Write scheduler_config.json into a folder."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        Path(save_directory, FILE).write_text(json.dumps(dict(self.config), indent=2) + "\n", encoding="utf-8")

    @property
    def compatibles(self) -> list[type[Scheduler]]:
        """The classes that can take the place of this one: all but that of consistency models, which none replaces."""
        return [kind for kind in CLASSES.values() if "lcm" not in (kind.sampler, self.sampler)]

    @property
    def betas(self) -> Tensor:
        """(T,) float32."""
        return torch.from_numpy(self.schedule.betas).float()

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float32."""
        return torch.from_numpy(self.schedule.alphas_cumprod).float()

    @property
    def init_noise_sigma(self) -> float:
        """What standard normal noise is multiplied with before the first step, by `prepare_latents`."""
        method, schedule = samplers.SAMPLERS[self.sampler], self.schedule
        if not method.variance_exploding:
            return 1.0
        steps = self._steps or schedule.num_train_timesteps
        sigma = schedule.sigma(method.timesteps(schedule, steps)[0])
        return (sigma**2 + 1) ** 0.5 if schedule.timestep_spacing == "leading" else sigma

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the `timesteps` of so many steps: the numbers that the UNet is called with, in their order."""
        visited = samplers.timesteps(self.sampler, self.schedule, num_inference_steps)
        self._steps = num_inference_steps
        kind = torch.float32 if samplers.SAMPLERS[self.sampler].variance_exploding else torch.int64
        self.timesteps = torch.tensor(calls(self.sampler, visited)[0], dtype=kind, device=device or "cpu")

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t at `timesteps` (B,) in the coordinates of this class's own steps."""
        levels = [self.schedule.sigma(float(t)) for t in timesteps]
        variance_exploding = samplers.SAMPLERS[self.sampler].variance_exploding
        pairs = [(1.0, sigma) if variance_exploding else variance_preserving(sigma) for sigma in levels]
        signal, sigma = original_samples.new_tensor(pairs)[:, :, None, None, None].unbind(1)
        return signal * original_samples + sigma * noise

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """x_t as the UNet takes it: of variance one."""
        if not samplers.SAMPLERS[self.sampler].variance_exploding:
            return sample
        return sample / (self.schedule.sigma(float(timestep)) ** 2 + 1) ** 0.5

    def step(self, *_: object, **__: object) -> None:
        """Single steps are not here. Raises ValueError naming what to take instead."""
        raise ValueError(f"{type(self).__name__} takes no single steps: call the pipeline or ldm2.samplers.sample, or "
                         "take the class of this name from diffusers")


class DDIMScheduler(Scheduler):
    """Denoising diffusion implicit models, arXiv:2010.02502."""

    sampler = "ddim"


class DDPMScheduler(Scheduler):
    """Denoising diffusion probabilistic models, arXiv:2006.11239."""

    sampler = "ddpm"


class PNDMScheduler(Scheduler):
    """Pseudo linear multistep, arXiv:2202.09778."""

    sampler = "pndm"


class LMSDiscreteScheduler(Scheduler):
    """Linear multistep in sigma."""

    sampler = "lms"


class EulerDiscreteScheduler(Scheduler):
    """Euler's method in sigma, arXiv:2206.00364."""

    sampler = "euler"


class EulerAncestralDiscreteScheduler(Scheduler):
    """Euler's method with fresh noise."""

    sampler = "euler-ancestral"


class HeunDiscreteScheduler(Scheduler):
    """Heun's method in sigma, arXiv:2206.00364."""

    sampler = "heun"
    order = 2
    defaults = _DEFAULTS | {"beta_start": 0.00085, "beta_end": 0.012}


class DPMSolverMultistepScheduler(Scheduler):
    """DPM-Solver++, arXiv:2211.01095."""

    sampler = "dpmpp-2m"


class UniPCMultistepScheduler(Scheduler):
    """UniPC, arXiv:2302.04867."""

    sampler = "unipc"


class LCMScheduler(Scheduler):
    """Multistep sampling of latent consistency models, arXiv:2310.04378."""

    sampler = "lcm"
    defaults = _DEFAULTS | {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


CLASSES: dict[str, type[Scheduler]] = {cls.__name__: cls for cls in Scheduler.__subclasses__()}


def read(value: object) -> tuple[str, Schedule]:
    """The sampler and the noise schedule of a scheduler, of ldm2 or of diffusers.

    Raises ValueError for other classes, and naming option and value for what is not implemented.
    """
    name = type(value).__name__
    if name not in CLASSES or not isinstance(getattr(value, "config", None), Mapping):
        raise ValueError(f"unknown scheduler {name!r}, choose from {', '.join(CLASSES)}")
    schedule = Schedule.from_dict(dict(value.config) | {"_class_name": name}, source=name)
    sampler = CLASSES[name].sampler
    if sampler == "dpmpp-2m" and value.config.get("algorithm_type") == "sde-dpmsolver++":
        sampler = "dpmpp-2m-sde"
    samplers.check_options(sampler, schedule, steps=schedule.num_train_timesteps)
    return sampler, schedule


def calls(sampler: str, timesteps: tuple[float, ...]) -> tuple[list[float], list[int]]:
    """(timesteps of the model calls, indices of those that end a step) of a run, as diffusers counts them.

    Heun's steps call the model twice, the last one once; PNDM's first step twice.
    """
    if sampler == "heun":
        twice = [timesteps[0], *(t for t in timesteps[1:] for _ in range(2))]
        return twice, [*range(1, len(twice), 2), *([len(twice) - 1] if len(twice) % 2 else [])]
    if sampler == "pndm" and len(timesteps) > 1:
        return [*timesteps[:2], *timesteps[1:]], list(range(1, len(timesteps) + 1))
    return list(timesteps), list(range(len(timesteps)))
