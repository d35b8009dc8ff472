"""What speed costs: how far fast ways to sample are from 200 DDIM steps, all of them guided, from the same noise.

    python -m benchmarks.tradeoff [--model tiny] [--prompts N] [--seeds N] [--out FOLDER]

Every sampler at several numbers of steps, timesteps that start at the last one of the training, guidance in a part of
the run, DeepCache, and the presets. Two distances: of the latents, relative to the norm of the reference's, and of
the log-mel spectrograms (mean absolute difference, in natural logarithms). Both also grow where a sound is as good but
another one. So three numbers of `ldm2 eval` stand beside them, with the model's own CLAP: the mean CLAP score, and the
Frechet and kernel audio distances of all sounds of a way from all of the reference. And a judge of sounds that were
made by formulas, meant for the bundled tiny model, says which share of them is what the prompt asked for.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import ldm2
from benchmarks import report
from benchmarks.arguments import add_out, count
from benchmarks.judge import is_right
from benchmarks.tiny_quality import PROMPTS
from ldm2 import atomic
from ldm2.checkpoints.random_models import SIZES, UNET
from ldm2.conditioning import Conditioning
from ldm2.config import UNetConfig
from ldm2.metrics import distances
from ldm2.metrics.embedding import Embedding
from ldm2.metrics.embedding import load as load_embedding
from ldm2.noise import SeededNoise
from ldm2.options import check_integer
from ldm2.runtime.profiling import flop_of, synchronise
from ldm2.samplers import SAMPLERS
from ldm2.settings import PRESETS, Sampling, Settings
from ldm2.unet import UNet

WHOLE_RUN = (0.0, 1.0)
REFERENCE = {"sampler": "ddim", "steps": 200, "guidance_interval": WHOLE_RUN, "cache_interval": 1, "spacing": None}
AT_ONCE = 16                               # sounds in one batch
STEPS = (10, 20, 50)
FEW = (8, 10, 12, 15, 25)                  # of the preset fast
TRAILING = ("ddim", "dpmpp-2m")
HALVES = ("bfloat16", "float16")           # the latter on GPUs alone
INTERVALS = ((0.0, 0.4), (0.0, 0.6), (0.0, 0.7), (0.0, 0.8), (0.1, 0.8), (0.2, 0.8), (0.2, 1.0), (0.4, 1.0), (0.3, 0.7))
GUIDED = (0.0, 0.7)
Call = tuple[int, bool]                    # branches of guidance, and whether the deep part is computed


@dataclass(frozen=True)
class Row:
    """One way to sample, and what it gave.

    seconds:  CPU time of the sampler for one sound (on a GPU: time)
    work:     floating-point operations of the published base model for the same calls, as a share of the reference's
    branches: evaluations of the UNet for one sound; guidance needs two for a model call
    latents, mel: mean distance to the reference. right: share that the judge accepts, None where it was not asked
    clap, frechet, kernel: as `ldm2 eval` has them, None where it was not asked; distances need two sounds
    """

    name: str
    kind: str
    settings: dict
    seconds: float
    work: float
    branches: float
    latents: float
    mel: float
    right: float | None
    clap: float | None = None
    frechet: float | None = None
    kernel: float | None = None


def ways() -> list[tuple[str, dict]]:
    """(kind, settings) of everything that is compared with the reference. The kind is the colour in the plot."""
    fast = REFERENCE | PRESETS["fast"]
    more = fast | {"steps": 25}
    rows = [(name, REFERENCE | {"sampler": name, "steps": steps}) for name in SAMPLERS for steps in STEPS]
    trailing = REFERENCE | {"spacing": "trailing"}
    rows += [("trailing", trailing | {"sampler": name, "steps": steps}) for name in TRAILING for steps in STEPS]
    rows += [("fewer steps", fast | {"steps": steps}) for steps in FEW]
    rows += [("guidance interval", more | {"guidance_interval": interval}) for interval in INTERVALS]
    rows += [("guidance interval", fast | {"steps": n, "guidance_interval": GUIDED}) for n in FEW]
    for way in (REFERENCE | {"steps": 50}, trailing | {"steps": 50}, more, fast):
        rows += [("DeepCache", way | {"cache_interval": n}) for n in (2, 3, 4)]
    rows += [("dtype", way | {"dtype": dtype}) for way in (REFERENCE | {"steps": 50}, fast) for dtype in HALVES]
    instant = REFERENCE | PRESETS["instant"]
    rows += [("instant", instant | {"steps": steps}) for steps in (1, 2)]
    presets = [(f"preset {name}", REFERENCE | settings) for name, settings in PRESETS.items()]
    rows = [row for row in rows if row[1] not in [settings for _, settings in presets]]
    return [row for i, row in enumerate(rows) if row[1] not in [settings for _, settings in rows[:i]]] + presets


def name_of(settings: dict) -> str:
    """For example "dpmpp-2m 25, trailing, guidance 0.1:0.8, DeepCache 2"."""
    start, end = settings["guidance_interval"]
    guided = "" if (start, end) == WHOLE_RUN else f", guidance {start:g}:{end:g}"
    guided += "".join(f", LoRA {word}" for word, _ in settings.get("lora", ()))
    reused = "" if settings["cache_interval"] == 1 else f", DeepCache {settings['cache_interval']}"
    reused += f", {settings['dtype']}" if "dtype" in settings else ""
    spaced = "" if settings["spacing"] is None else f", {settings['spacing']}"
    return f"{settings['sampler']} {settings['steps']}{spaced}{guided}{reused}"


@functools.cache
def operations() -> dict[Call, int]:
    """Floating-point operations of each kind of model call of the published base model, for 10.24 s."""
    counts = {}
    with torch.device("meta"), torch.no_grad():            # shapes are enough to count
        unet = UNet(UNetConfig.from_dict(UNET | SIZES["audioldm2"]))
        x_t, time = torch.empty(1, 8, 256, 16), unet.embed_time(1.0)
        for branches in (1, 2):
            contexts = torch.empty(branches, 8, 768), torch.empty(branches, 16, 1024)
            prepared = unet.prepare(Conditioning(contexts, (None, None)))
            features = unet.forward_cached(x_t, 1.0, prepared, time)[1]
            for given in (None, features):
                call = functools.partial(unet.forward_cached, x_t, 1.0, prepared, time, given)
                counts[branches, given is None] = flop_of(call)
    return counts


def work(calls: Counter[Call]) -> int:
    """Floating-point operations of these calls in the published base model."""
    return sum(operations()[call] * count for call, count in calls.items())


class Tally(nn.Module):
    """In the place of a UNet: it counts the calls of each kind and computes nothing."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))         # tells the device
        self.calls: Counter[Call] = Counter()

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        return conditioning

    def embed_time(self, timesteps: Tensor) -> Tensor:
        return timesteps[:, None]

    def forward(self, x_t: Tensor, t: float, conditioning: Conditioning, time: Tensor | None = None) -> Tensor:
        return self.forward_cached(x_t, t, conditioning, time)[0]

    def forward_cached(
        self, x_t: Tensor, t: float, conditioning: Conditioning, time: Tensor | None = None,
        features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        self.calls[conditioning.batch_size // len(x_t), features is None] += 1
        return x_t.new_zeros(conditioning.batch_size, *x_t.shape[1:]), x_t


def calls_of(pipe: ldm2.AudioLDM2, settings: dict) -> Counter[Call]:
    """How often each kind of model call is made for one sound with guidance."""
    counting = copy.copy(pipe)
    counting.unet = Tally()
    side, latents = Conditioning((torch.zeros(1, 1, 1),), (None,)), torch.zeros(1, 1, 1, 1)
    counting.denoise(side, side, latents, sampling(settings, guidance_scale=2.0), noise=torch.zeros_like)
    return counting.unet.calls


def sampling(settings: dict, **defaults: float) -> Sampling:
    """How the sampler runs; LoRAs and dtype are no part of it."""
    return Sampling(**defaults | {name: value for name, value in settings.items() if name not in ("lora", "dtype")})


class Comparison:
    """A model and a batch of prompts with their noise; runs ways to sample, and compares them with the reference."""

    def __init__(
        self, pipe: ldm2.AudioLDM2, prompts: int, seeds: int, judged: bool, embedding: Embedding | None = None
    ):
        chosen = list(PROMPTS)[:: max(1, len(PROMPTS) // prompts)][:prompts]
        self.pipe, self.judged, self.embedding = pipe, judged, embedding
        self.kinds = [kind for kind in chosen for _ in range(seeds)]
        self.seeds = [seed for _ in chosen for seed in range(seeds)]
        conditioning = pipe.encode([PROMPTS[kind][0] for kind in chosen])
        self.sides = [side.repeat(seeds) for side in (conditioning, pipe.encode_unconditional(conditioning))]
        self.run({**REFERENCE, "steps": 2})                # the first calls are slow
        self.reference, self.seconds = self.run(REFERENCE)
        self.reference_mel = self.pipe.decode(self.reference).float()
        if embedding is not None:
            texts = dict(zip(chosen, embedding.texts([PROMPTS[kind][0] for kind in chosen])))
            self.texts = np.stack([texts[kind] for kind in self.kinds])      # (sounds, D)
            self.reference_vectors = self.vectors(self.waves(self.reference_mel))

    def run(self, settings: dict) -> tuple[Tensor, float]:
        """Latents of all sounds, and the time for one."""
        shape = self.pipe.latent_shape(Settings("any").resolved(self.pipe.defaults).seconds)
        clock, parts = clock_of(self.pipe.device), []
        dtype = settings.get("dtype")
        if dtype is not None:
            return self.in_dtype(dtype).run({name: value for name, value in settings.items() if name != "dtype"})
        with self.pipe.adapters.hold(settings.get("lora")):
            started = clock()
            for first in range(0, len(self.seeds), AT_ONCE):
                rows = slice(first, first + AT_ONCE)
                noise, sides = SeededNoise(self.seeds[rows]), [side.select(rows) for side in self.sides]
                parts.append(self.pipe.denoise(*sides, noise.draw(*shape), sampling(settings), noise=noise))
            return torch.cat(parts), (clock() - started) / len(self.seeds)

    @functools.cache                                       # noqa: B019
    def in_dtype(self, dtype: str) -> Comparison:
        """The same prompts with the model in another dtype; what compares is left out."""
        other = copy.copy(self)
        other.pipe = ldm2.load(self.pipe.origin["model"], device=str(self.pipe.device), dtype=dtype)
        other.pipe.defaults.update(self.pipe.defaults)
        return other

    def row(self, kind: str, settings: dict) -> Row:
        """Run, and compare."""
        latents, seconds = (self.reference, self.seconds) if settings == REFERENCE else self.run(settings)
        mel, calls = self.pipe.decode(latents), calls_of(self.pipe, settings)
        waves = self.waves(mel) if self.judged or self.embedding is not None else None
        scores = {} if self.embedding is None else self.scores(waves)
        return Row(
            name=name_of(settings), kind=kind, settings=settings, seconds=seconds,
            work=work(calls) / work(calls_of(self.pipe, REFERENCE)),
            branches=float(sum(branches * count for (branches, _), count in calls.items())),
            latents=float((norms(latents - self.reference) / norms(self.reference)).mean()),
            mel=float((mel.float() - self.reference_mel).abs().mean()),
            right=self.right(waves) if self.judged else None, **scores,
        )

    def waves(self, mel: Tensor) -> np.ndarray:
        """Waveforms (sounds, N)."""
        return self.pipe.vocode(mel.to(self.pipe.dtype)).numpy()

    def vectors(self, waves: np.ndarray) -> np.ndarray:
        """Embeddings (sounds, D)."""
        return np.stack([self.embedding.sound(wave, self.pipe.sample_rate) for wave in waves])

    def scores(self, waves: np.ndarray) -> dict[str, float]:
        """CLAP score, and distances from the reference where there are two sounds or more."""
        vectors = self.vectors(waves)
        found = {"clap": float((vectors * self.texts).sum(axis=1).mean())}
        if len(vectors) > 1:
            found["frechet"] = distances.frechet(vectors, self.reference_vectors)
            found["kernel"] = distances.kernel(vectors, self.reference_vectors)
        return found

    def right(self, waves: np.ndarray) -> float:
        """Share of the sounds that are what their prompts asked for."""
        return sum(is_right(wave, kind) for wave, kind in zip(waves, self.kinds)) / len(waves)


def norms(latents: Tensor) -> Tensor:
    """The L2 norm of each row of (B, ...): (B,)."""
    return latents.flatten(1).norm(dim=1)


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds: CPU time on a CPU, which other processes disturb least; elsewhere time, when the device is done."""
    if device.type == "cpu":
        return time.process_time

    def clock() -> float:
        synchronise(device)
        return time.perf_counter()

    return clock


def pareto(rows: list[Row]) -> list[Row]:
    """The rows for which no other row is nearer to the reference (log-mel) in less time, fastest first."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.seconds, row.mel)):
        if not best or row.mel < best[-1].mel:
            best.append(row)
    return best


def table(rows: list[Row]) -> str:
    """Markdown; those on the Pareto curve are marked."""
    best = pareto(rows)
    lines = ["| | way | s / sound | work at full size | UNet branches | latents | log-mel | CLAP score | FAD | KAD | "
             "right | Pareto |", "|---" * 12 + "|"]
    for row in rows:
        told = [("", "{:.3f}")[value is not None].format(value) for value in (row.clap, row.frechet, row.kernel)]
        right = "" if row.right is None else f"{row.right:.2f}"
        lines.append(f"| {row.kind} | {row.name} | {row.seconds:.3f} | {row.work:.3f} | {row.branches:.0f} | "
                     f"{row.latents:.3f} | {row.mel:.3f} | {' | '.join(told)} | {right} | "
                     f"{'*' if row in best else ''} |")
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """Time against log-mel distance, a colour for each kind, the Pareto curve, and names along it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.mel > 0]            # the reference has no place on a logarithmic axis
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    kinds = list(dict.fromkeys(row.kind for row in rows))
    for i, kind in enumerate(kinds):
        points = [(row.seconds, row.mel) for row in rows if row.kind == kind]
        preset = kind.startswith("preset")
        ax.plot(*zip(*points), "*" if preset else "osD^v"[i % 5], markersize=18 if preset else 6, color=f"C{i % 10}",
                markeredgecolor="black" if i >= 10 else "none", label=kind)
    best = pareto(rows)
    ax.plot([row.seconds for row in best], [row.mel for row in best], color="grey", linewidth=1, zorder=0)
    for row in best:
        ax.annotate(row.name, (row.seconds, row.mel), fontsize=7, xytext=(4, 4), textcoords="offset points")
    ax.set(xscale="log", yscale="log", xlabel="time of the sampler in s for one sound",
           ylabel="log-mel distance to 200 DDIM steps with full guidance")
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize=8)
    with atomic.whole(path, overwrite=True) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def facts(comparison: Comparison, model: str) -> dict:
    """Machine, versions, command, and what was compared."""
    pipe, embedding = comparison.pipe, comparison.embedding
    settings = Settings("any").resolved(comparison.pipe.defaults)
    return report.about(f"python -m benchmarks.tradeoff {shlex.join(sys.argv[1:])}".strip(), pipe.device, {
        "model": model, "sounds": len(comparison.seeds), "kinds": list(dict.fromkeys(comparison.kinds)),
        "guidance_scale": settings.guidance_scale, "seconds": settings.seconds,
        "dtype": str(pipe.dtype)[6:],
    } | ({} if embedding is None else {"embedding": embedding.name, "embedding_revision": embedding.revision,
                                       "resampler": embedding.resampler}))


def write(stem: Path, told: dict, rows: list[Row], text: str) -> None:
    """STEM.json and STEM.md."""
    content = {**told, "rows": [asdict(row) for row in rows]}
    report.write(stem.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    lines = [f"- {name}: {', '.join(value) if isinstance(value, list) else value}" for name, value in told.items()]
    heading = "# Distance to 200 DDIM steps with full guidance, against time"
    report.write(stem.with_suffix(".md"), "\n".join([heading, "", *lines, "", text, ""]))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tradeoff", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="tiny", help="name or folder (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompts", type=count, default=6, help="how many kinds of sound (default: %(default)s)")
    parser.add_argument("--seeds", type=count, default=2, help="sounds of each (default: %(default)s)")
    kinds = list(dict.fromkeys(kind for kind, _ in ways()))
    parser.add_argument("--only", action="append", choices=kinds, metavar="KIND", help="ways of this kind, such as "
                        "\"preset instant\"; may be repeated (default: all)")
    parser.add_argument("--no-judge", action="store_true", help="for models that know other sounds")
    parser.add_argument("--no-scores", action="store_true", help="neither CLAP score nor distances of embeddings")
    add_out(parser)
    args = parser.parse_args(arguments)
    pipe = ldm2.load(args.model, device=args.device, dtype=args.dtype)
    prompts, seeds = check_integer("prompts", args.prompts), check_integer("seeds", args.seeds)
    clap = None if args.no_scores else load_embedding(args.model, device=pipe.device)
    comparison = Comparison(pipe, prompts, seeds, judged=not args.no_judge, embedding=clap)
    rows = [comparison.row("reference", REFERENCE)]
    compared = [way for way in ways() if not args.only or way[0] in args.only]
    compared = [way for way in compared if pipe.device.type == "cuda" or way[1].get("dtype") != "float16"]
    compared = [way for way in compared if all(word in pipe.loras for word, _ in way[1].get("lora", ()))]
    for kind, settings in compared:
        rows.append(comparison.row(kind, settings))
        print(f"{len(rows)} of {len(compared) + 1}: {rows[-1].name}", file=sys.stderr)
    text = table(rows)
    print(text)
    write(args.out / "tradeoff", facts(comparison, args.model), rows, text)
    if find_spec("matplotlib") is not None:
        draw(rows, args.out / "tradeoff.png")


if __name__ == "__main__":
    main()
