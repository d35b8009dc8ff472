"""The optimisation loop that all stages share: AdamW, warm-up and decay, moving average of the weights, resuming.

Everything random in step i comes from a generator seeded with (seed, i), so that a resumed run continues as if it had
not stopped, and equal seeds give equal weights.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from ldm2 import atomic
from ldm2.fields import first_line

log = logging.getLogger(__name__)

HELD_OUT = "held_out"                      # what `evaluate` calls the number that an early stop looks at
_SHARED_AT_ONCE = 16_000_000               # numbers of a gradient that processes add up in one go

Loss = Callable[[int, torch.Generator], "Tensor | Iterable[Tensor]"]
Told = Callable[[int, dict[str, float]], object]


class OutOfTime(Exception):
    """The piece's time is over; all is saved, and the same command with --resume goes on."""


class Stopped(KeyboardInterrupt):
    """Somebody asked the training to stop, with the signal of this number; the step that ran was finished and saved."""

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")
        self.number, self.step = number, step


@dataclass
class Clock:
    """When a piece of work has to stop, and how it reports. deadline in seconds of time.monotonic, None = never."""

    folder: Path
    deadline: float | None = None
    progress: bool = True
    save_every: float = 120.0              # seconds
    curve: bool = False                    # write the loss of each step to log.jsonl

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
    average: float = 0.998                 # of the weights, per step; 0: none
    clip: float = 1.0                      # of the gradient's norm
    weight_decay: float = 0.0
    seed: int = 0
    patience: int | None = None            # evaluations without a smaller held-out value after which to stop

    def rate_at(self, step: int) -> float:
        falling = 1.0 if self.decay_from == 1 else (self.steps - step) / max(self.steps * (1 - self.decay_from), 1)
        return self.rate * min(1.0, (step + 1) / self.warmup, falling)


def generator_for(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**64)


class _Run:
    """The state of a training: what a save holds, and a resumed run begins with."""

    def __init__(self, name: str, module: nn.Module, recipe: Recipe, clock: Clock):
        self.name, self.module, self.recipe, self.clock = name, module, recipe, clock
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=recipe.rate, betas=(0.9, 0.99),
                                           weight_decay=recipe.weight_decay)
        self.averaged = [p.detach().clone() for p in self.parameters]
        self.best: list[Tensor] = []                       # averaged weights of the smallest held-out value
        self.step, self.recent, self.smallest, self.waited = 0, 0.0, float("inf"), 0
        self.path = clock.folder / f"{name}.pt"
        if self.path.exists():
            self._restore()
        self.journal = Journal(clock.folder / "log.jsonl", name, self.step) if rank() == 0 else None
        self._saved = time.monotonic()

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        patience = self.recipe.patience
        return self.step >= self.recipe.steps or (patience is not None and self.waited >= patience)

    def optimise(self, loss: Loss) -> dict[str, float]:
        """One step of the optimiser. Returns what it was like. Raises FloatingPointError."""
        rate = self.recipe.rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        value = 0.0
        found = loss(self.step, generator_for(self.recipe.seed + rank(), self.step))
        for part in [found] if isinstance(found, Tensor) else found:
            part.backward()
            value += float(part.detach())
        _share_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"{self.name}: the gradient of step {self.step} is not finite")
        self.optimizer.step()
        share = min(self.recipe.average, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.averaged, [p.detach() for p in self.parameters], 1 - share)
        value = _mean(value)
        self.recent += 0.02 * (value - self.recent) if self.step else value
        self.step += 1
        return {"loss": value, "rate": rate}

    def evaluate(self, evaluate: Callable[[], dict[str, float]] | None) -> dict[str, float]:
        """The held-out values of the averaged weights, which also go to the log."""
        values: dict[str, float] = {}
        if evaluate is not None:
            with self._averaged(), torch.no_grad():
                values = {key: float(value) for key, value in evaluate().items()}
        if HELD_OUT in values:
            self.waited += 1
            if values[HELD_OUT] < self.smallest:
                self.smallest, self.waited = values[HELD_OUT], 0
                self.best = [p.clone() for p in self.averaged] if self.recipe.patience else []
        if values or not self.clock.curve:
            self.note({"loss": round(self.recent, 5)} | {key: round(value, 5) for key, value in values.items()})
        return values

    def note(self, values: dict[str, float]) -> None:
        """A line of the log."""
        line = {"stage": self.name, "step": self.step} | values
        log.info("%s", json.dumps(line))
        if self.journal is not None:
            self.journal.add(line)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The module holds the averaged weights inside."""
        current, was_training = [p.detach().clone() for p in self.parameters], self.module.training
        _put(self.parameters, self.averaged)
        self.module.eval()
        try:
            yield
        finally:
            self.module.train(was_training)
            _put(self.parameters, current)

    def finish(self) -> None:
        """The module holds what is to be kept."""
        _put(self.parameters, self.best or self.averaged)

    def save_sometimes(self) -> None:
        """Save if it is time to. A disk that is full costs no work: it is said, and tried again when it is time."""
        if time.monotonic() - self._saved > self.clock.save_every:
            try:
                self.save()
            except OSError as error:
                log.warning("%s: not saved at step %d, the training goes on (%s)", self.name, self.step, error)
                self._saved = time.monotonic()

    def save(self) -> None:
        """Written beside and then moved, so that a kill or a full disk leaves the old file. Raises OSError."""
        if rank():
            return
        fields = {"step": self.step, "module": _kept(self.module), "optimizer": self.optimizer.state_dict(),
                  "averaged": self.averaged, "best": self.best, "recent": self.recent, "smallest": self.smallest,
                  "waited": self.waited}
        with atomic.whole(self.path, overwrite=True) as temporary, open(temporary, "wb") as file:
            try:
                torch.save(fields, file)
            except RuntimeError as error:                  # how PyTorch says that a write failed
                raise OSError(f"{self.path} could not be written, is the disk full? ({first_line(error)})") from error
        self._saved = time.monotonic()

    def _restore(self) -> None:
        fields = torch.load(self.path, weights_only=True, map_location="cpu")
        self.module.load_state_dict(fields["module"], strict=False)
        self.optimizer.load_state_dict(fields["optimizer"])
        _put(self.averaged, fields["averaged"])
        self.best = [value.to(p) for value, p in zip(fields["best"], self.parameters)]
        self.step, self.recent = fields["step"], fields["recent"]
        self.smallest, self.waited = fields["smallest"], fields["waited"]


class Journal:
    """log.jsonl: a line for each thing that was measured. What a stopped run wrote after its last save is taken out."""

    def __init__(self, path: Path, stage: str, step: int):
        before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        lines = [line for line in before if not _is_later(line, stage, step)]
        if lines != before:
            with atomic.whole(path, overwrite=True) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self._path = path

    def add(self, values: dict[str, Any]) -> None:
        """Append a line. A disk that is full costs the line, not the training."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            log.warning("%s: a line could not be written (%s)", self._path, error)


def _is_later(line: str, stage: str, step: int) -> bool:
    """Whether a line of a log is of a stage beyond a step, or was cut in two."""
    try:
        values = json.loads(line)
        return values["stage"] == stage and values["step"] > step
    except (ValueError, KeyError, TypeError):
        return True


def train(
    name: str,
    module: nn.Module,
    loss: Loss,
    recipe: Recipe,
    clock: Clock,
    evaluate: Callable[[], dict[str, float]] | None = None,
    evaluate_every: int = 500,
    told: Told | None = None,
) -> int:
    """Minimises loss(step, generator) over the module's parameters that need a gradient. Returns the last step.

    loss may also return several tensors one after the other, whose sum it is: each is differentiated before the next
    one is computed, so that memory holds one at a time (gradient accumulation).
    told: called as told(step, values) after each step, with the loss, the rate, and what `evaluate` returned.
    At the end the module holds the averaged weights (with `patience`: those of the smallest held-out value), which
    `clock.folder / (name + ".pt")` keeps too; if that file is there already, from this or an interrupted run, the work
    goes on from it. Raises OutOfTime at the deadline, Stopped after Ctrl-C or SIGTERM, OSError if the end cannot be
    saved, and FloatingPointError if the loss is not finite. Of several processes each brings a batch of its own.
    """
    run = _Run(name, module, recipe, clock)
    bar = tqdm(total=recipe.steps, initial=run.step, desc=name, disable=not clock.progress or rank() > 0,
               mininterval=1.0 if sys.stderr.isatty() else 30.0, dynamic_ncols=True)
    with bar, _signals() as signals:
        while not run.over:
            values = run.optimise(loss)
            if clock.curve:
                run.note({"loss": values["loss"]})
            bar.update()
            bar.set_postfix_str(f"loss {run.recent:.4f}", refresh=False)
            if rank() == 0 and (run.step % evaluate_every == 0 or run.step == recipe.steps):
                values |= run.evaluate(evaluate)
            if recipe.patience is not None:
                run.waited = _largest(0 if rank() else run.waited)
            if told is not None and rank() == 0:
                told(run.step, values)
            stop = _largest(max(signals, default=0))
            late = _largest(int(clock.deadline is not None and time.monotonic() > clock.deadline))
            if run.over or stop or late:
                run.save()
            else:
                run.save_sometimes()
            if stop:
                raise Stopped(stop, run.step)
            if late and not run.over:
                raise OutOfTime
    run.finish()
    return run.step


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that ask to stop and have come, in place of what they do otherwise; a second one does that."""
    came: list[int] = []
    asking = signal.SIGINT, signal.SIGTERM
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.getsignal(number) for number in asking}

    def stop(number: int, _: object) -> None:
        came.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in asking:
        signal.signal(number, stop)
    try:
        yield came
    finally:
        restore()


def rank() -> int:
    """The number of this process among those that train together; 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _share_gradients(parameters: Sequence[Tensor]) -> None:
    """Mean over all processes, if there are several: each has drawn a batch of its own."""
    if not dist.is_initialized():
        return
    group: list[Tensor] = []
    gradients = [p.grad for p in parameters if p.grad is not None]
    for gradient in gradients:
        group.append(gradient)
        if sum(each.numel() for each in group) >= _SHARED_AT_ONCE or gradient is gradients[-1]:
            whole = torch.cat([each.flatten() for each in group])
            dist.all_reduce(whole)
            whole /= dist.get_world_size()
            for each, part in zip(group, whole.split([each.numel() for each in group])):
                each.copy_(part.view_as(each))
            group = []


def _largest(value: int) -> int:
    """The largest of the numbers that the processes have."""
    return int(_reduced(float(value), dist.ReduceOp.MAX))


def _mean(value: float) -> float:
    """The mean of the numbers that the processes have."""
    return _reduced(value, dist.ReduceOp.SUM) / processes()


def _reduced(value: float, operation: Any) -> float:
    if not dist.is_initialized():
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    whole = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(whole, operation)
    return float(whole)


@torch.no_grad()
def _put(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _kept(module: nn.Module) -> dict[str, Tensor]:
    """What training changes in a module: parameters that need a gradient, and buffers. The rest comes from elsewhere.
    """
    fixed = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in fixed}
