"""The optimisation loop that all stages share: AdamW, warm-up and decay, moving average of the weights, resuming.

Everything random in step i comes from a generator seeded with (seed, i), so that a resumed run continues as if it had
not stopped, and equal seeds give equal weights.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

log = logging.getLogger(__name__)


class OutOfTime(Exception):
    """The piece's time is over; all is saved, and the same command with --resume goes on."""


@dataclass
class Clock:
    """When a piece of work has to stop, and how it reports. deadline in seconds of time.monotonic, None = never."""

    folder: Path
    deadline: float | None = None
    progress: bool = True
    save_every: float = 120.0              # seconds

    def check(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime


@dataclass(frozen=True)
class Recipe:
    """How one stage is optimised."""

    steps: int
    rate: float                            # peak learning rate
    warmup: int = 100                      # steps
    decay_from: float = 0.3                # share of the steps after which the rate falls, linearly, to zero
    average: float = 0.998                 # of the weights, per step
    clip: float = 1.0                      # of the gradient's norm
    weight_decay: float = 0.0
    seed: int = 0

    def rate_at(self, step: int) -> float:
        falling = (self.steps - step) / max(self.steps * (1 - self.decay_from), 1)
        return self.rate * min(1.0, (step + 1) / self.warmup, falling)


def generator_for(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**64)


def train(
    name: str,
    module: nn.Module,
    loss: Callable[[int, torch.Generator], Tensor],
    recipe: Recipe,
    clock: Clock,
    evaluate: Callable[[], dict[str, float]] | None = None,
    evaluate_every: int = 500,
) -> None:
    """Minimises loss(step, generator) over the module's parameters that need a gradient.

    At the end the module holds the averaged weights, which `clock.folder / (name + ".pt")` keeps too; if that file is
    there already, from this or an interrupted run, the work goes on from it. Raises OutOfTime at the deadline, and
    FloatingPointError if the loss is not finite.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay)
    averaged = [p.detach().clone() for p in parameters]
    path = clock.folder / f"{name}.pt"
    rank = dist.get_rank() if dist.is_initialized() else 0
    step, recent = _restore(path, module, optimizer, averaged), 0.0
    saved = time.monotonic()
    bar = tqdm(total=recipe.steps, initial=step, desc=name, disable=not clock.progress or rank > 0, mininterval=5.0)
    while step < recipe.steps:
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        value = loss(step, generator_for(recipe.seed + rank, step))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        _share_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, recipe.clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"{name}: the gradient of step {step} is not finite")
        optimizer.step()
        share = min(recipe.average, (1 + step) / (10 + step))
        torch._foreach_lerp_(averaged, [p.detach() for p in parameters], 1 - share)
        recent += 0.02 * (float(value.detach()) - recent) if step else float(value.detach())
        step += 1
        bar.update()
        if rank == 0 and (step % evaluate_every == 0 or step == recipe.steps):
            _report(name, step, recent, module, parameters, averaged, evaluate, clock)
        over = _any(clock.deadline is not None and time.monotonic() > clock.deadline)
        if rank == 0 and (over or step == recipe.steps or time.monotonic() - saved > clock.save_every):
            _save(path, step, module, optimizer, averaged)
            saved = time.monotonic()
        if over and step < recipe.steps:
            bar.close()
            raise OutOfTime
    bar.close()
    _put(parameters, averaged)


def _share_gradients(parameters: Sequence[Tensor]) -> None:
    """Mean over all processes, if there are several: each has drawn a batch of its own."""
    if not dist.is_initialized():
        return
    whole = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(whole)
    whole /= dist.get_world_size()
    for p, part in zip(parameters, whole.split([p.numel() for p in parameters])):
        p.grad.copy_(part.view_as(p.grad))


def _any(flag: bool) -> bool:
    """Whether a condition is true in any of the processes."""
    if not dist.is_initialized():
        return flag
    value = torch.tensor(float(flag))
    dist.all_reduce(value)
    return bool(value > 0)


def _report(name, step, recent, module, parameters, averaged, evaluate, clock) -> None:
    """A line in the log, with the held-out values of the averaged weights."""
    values = {"stage": name, "step": step, "loss": round(recent, 5)}
    if evaluate is not None:
        current = [p.detach().clone() for p in parameters]
        _put(parameters, averaged)
        was_training = module.training
        module.eval()
        with torch.no_grad():
            values |= {key: round(float(value), 5) for key, value in evaluate().items()}
        module.train(was_training)
        _put(parameters, current)
    log.info("%s", json.dumps(values))
    with (clock.folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


@torch.no_grad()
def _put(parameters: Sequence[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _save(path: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, averaged: list[Tensor]) -> None:
    """Written beside and then moved, so that a kill leaves the old file or the new one."""
    fields = {"step": step, "module": module.state_dict(), "optimizer": optimizer.state_dict(), "averaged": averaged}
    torch.save(fields, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def _restore(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, averaged: list[Tensor]) -> int:
    if not path.exists():
        return 0
    fields = torch.load(path, weights_only=True, map_location="cpu")
    module.load_state_dict(fields["module"])
    optimizer.load_state_dict(fields["optimizer"])
    _put(averaged, fields["averaged"])
    return fields["step"]
