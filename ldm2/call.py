"""How the functions that make sound take their options: as keywords, typed and checked by the fields of `Settings`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

from ldm2.options import options_of
from ldm2.runtime.progress import Progress
from ldm2.settings import EDITS, GENERATE, ORIGIN, TASKS, Settings

if TYPE_CHECKING:
    from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def _live(*tasks: str) -> Any:
    """A field that no file can hold, of some tasks."""
    return field(default=None, kw_only=True, metadata={"tasks": tasks or TASKS})


@dataclass(frozen=True)
class Call(Settings):
    """Settings, and what a call takes beside them that no file can hold.

    latents:     standard normal (rows, C, T/f, F/f) to start from in place of the seeds' own
    sample_rate: of samples that are given as an array, in Hz; a file carries its own
    callback:    called as callback(step, total, latents) after each step; returning False stops with ldm2.Cancelled
    progress:    True shows a progress bar on stderr; a function is called as progress(stage, done, total)
    """

    latents: Tensor | None = _live(GENERATE)
    sample_rate: int | None = _live(*EDITS)
    callback: Callable[[int, int, Tensor], object] | None = _live()
    progress: bool | Progress = field(default=False, kw_only=True, metadata={"tasks": TASKS})

    @classmethod
    def of(cls, task: str, origin: Mapping[str, object], /, *args: Any, **options: Any) -> Self:
        """The call of a function: its arguments, checked; `origin` is that of the model at hand.

        What files say of their origin may stand beside the options, but must be true of that model.

        Raises ValueError, and UnknownOption for names that are none.
        """
        stated = {name: options.pop(name) for name in ORIGIN if name in options}
        for name in ("model", "reference"):
            if name in stated and name in origin and stated[name] != origin[name]:
                raise ValueError(f"these settings are for {name} {stated[name]!r}, this is {origin[name]!r}")
        return cls.create(task, *args, **options)


def takes_settings(
    task: str, call: Callable[P, Call]
) -> Callable[[Callable[..., R]], Callable[Concatenate[Any, P], R]]:
    """Decorator of a method that takes what `call` (the class above) takes, for a task.

    Editors, type checkers and `help` see each option by its name, though it is written down in `Settings` alone.
    """

    def decorate(function: Any) -> Any:
        whole = inspect.signature(function)
        own = {name: each for name, each in whole.parameters.items() if each.kind is each.POSITIONAL_OR_KEYWORD}
        options = [each for each in parameters(task) if each.name not in own]
        function.__signature__ = whole.replace(parameters=[*own.values(), *options])
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{describe(task)}"
        return function

    return decorate


def takes_sound(
    task: str, call: Callable[P, Call]
) -> Callable[[Callable[..., R]], Callable[Concatenate[Any, Any, P], R]]:
    """`takes_settings` for a method whose first argument is a sound."""
    decorate: Any = takes_settings(task, call)
    return decorate


def parameters(task: str) -> list[inspect.Parameter]:
    """The parameters that the options of a task are."""
    known, beside = options_of(Call, task), Call.beside(task)
    result = []
    for each in fields(Call):
        if each.name in (*known, *beside) and each.name != "task":
            kind = inspect.Parameter.KEYWORD_ONLY if each.kw_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
            default = inspect.Parameter.empty if each.default is MISSING else each.default
            result.append(inspect.Parameter(each.name, kind, default=default, annotation=each.type))
    return sorted(result, key=lambda parameter: parameter.kind)


def describe(task: str) -> str:
    """The options of a task for a docstring, one a line."""
    lines = []
    for name, each in options_of(Call, task).items():
        default = each.default_for(task)
        suffix = "" if default is None else f" (default: {default}, or the checkpoint's own)"
        lines.append(f"{name + ':':<18} {each.help}{suffix}")
    return "\n".join(lines)
