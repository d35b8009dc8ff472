"""What came of a case: the same sound, a clear refusal, or one of the faults that the fuzzers look for."""

from __future__ import annotations

import shutil
import signal
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import ldm2
from benchmarks import checkpoints
from tests import authors
from tests.fuzz import damage
from tests.fuzz.damage import Chooser

SETTINGS = {"seconds": 0.1, "steps": 1, "seed": 1, "guidance_scale": 2.0, "num_waveforms": 2}
PROMPT = "a dog barking in the rain"
OUTCOMES = ("right", "silent", "traceback", "hang", "unclear")
SECONDS = 60                                               # after which a case counts as hanging


@dataclass(frozen=True)
class Verdict:
    """outcome: one of OUTCOMES; what was done to the file, and what came of it."""

    outcome: str
    done: str
    found: str = ""


@dataclass(frozen=True)
class Target:
    """A checkpoint to damage copies of: its path, the ways to do it, how it is loaded, the sound that it gives."""

    path: Path
    ways: tuple[damage.Damage, ...]
    load: Callable[[Path], ldm2.AudioLDM2]
    sound: np.ndarray

    @classmethod
    def of(cls, path: Path, ways: tuple[damage.Damage, ...], load: Callable[[Path], ldm2.AudioLDM2]) -> Target:
        return cls(path, ways, load, made(load(path)))

    def case(self, place: Path, pick: Chooser) -> Verdict:
        """Damage a copy at `place`, which is gone afterwards, and judge what comes of it."""
        copy = place / self.path.name
        if self.path.is_dir():
            shutil.copytree(self.path, copy)
        else:
            shutil.copyfile(self.path, copy)
        done = pick.choose(self.ways)(copy, pick)
        try:
            return self.judge(copy, done)
        finally:
            if copy.is_dir():
                shutil.rmtree(copy)
            else:
                copy.unlink(missing_ok=True)

    def judge(self, copy: Path, done: str) -> Verdict:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                sound = made(self.load(copy))
        except TimeoutError:
            return Verdict("hang", done)
        except (ValueError, OSError) as error:
            clear = "\n" not in str(error) and (copy.name in str(error) or "table has" in str(error))
            return Verdict("right" if clear else "unclear", done, str(error))
        except Exception:
            return Verdict("traceback", done, traceback.format_exc(limit=-3))
        heard = min(len(sound), len(self.sound))           # without the scores, where it says that it cannot rank
        same = heard >= len(self.sound) - 2 and np.allclose(sound[:heard], self.sound[:heard], atol=1e-4)
        return Verdict("right" if same else "silent", done)


def made(pipe: ldm2.AudioLDM2) -> np.ndarray:
    """Sounds in the order of their seeds, their scores behind them; what cannot rank says so and gives no scores."""
    result = pipe.generate(PROMPT, **SETTINGS)
    order = np.argsort(result.seeds)
    scores = [] if result.scores is None else np.asarray(result.scores, "f")[order]
    return np.concatenate([np.ravel(result.waveforms[order]), scores])


def targets(place: Path) -> dict[str, Target]:
    """Tiny checkpoints of each kind, made below `place`."""
    tokenizers = authors.save_tokenizers(place / "tokenizers")
    file = authors.save(authors.whole_state(authors.modules("sound")), place / "model.pth")
    return {
        "hub folder": Target.of(checkpoints.save(place / "folder"), damage.FOLDER, ldm2.load),
        "authors' file": Target.of(file, damage.AUTHORS, lambda path: ldm2.load(path, tokenizers=tokenizers)),
    }


class Alarm:
    """`with Alarm(seconds):` raises TimeoutError in what takes longer; on the main thread of systems that have it."""

    def __init__(self, seconds: int):
        self.seconds = seconds

    def __enter__(self) -> None:
        def ring(*_) -> None:
            raise TimeoutError

        self.old = signal.signal(signal.SIGALRM, ring)
        signal.alarm(self.seconds)

    def __exit__(self, *_) -> None:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, self.old)
