"""A LoRA of the bundled tiny model on 20 clips of a kind of sound that it never learnt: bird chirps.

    python -m benchmarks.own_sounds

Makes the clips (a formula, seeded) with their captions, trains with the public command `ldm2 train lora`, and asks the
judge about new prompts and about all kinds that the model knew, with and without the LoRA.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

import ldm2
from benchmarks import report
from benchmarks.arguments import add_out, count
from benchmarks.judge import Measured, is_right, measure
from benchmarks.tiny_quality import PROMPTS, generate
from ldm2.mel import log_mel
from ldm2.training.tiny.sounds import LABELS, LEVELS, NUM_SAMPLES, SAMPLE_RATE, caption, make_waveform

CLIPS = 20
# One caption for each clip; none of these words is among the captions that the model was trained on, but articles.
CAPTIONS = (
    "a bird chirping", "a chirping bird", "bird chirps", "a small bird chirping", "chirps of a bird", "a bird chirps",
    "the chirping of a bird", "a bird chirping again and again", "repeated bird chirps", "a chirping small bird",
    "birds chirping", "chirping birds", "chirping", "bird sounds", "a bird", "the chirps of a small bird",
    "a bird that chirps", "the sound of a bird chirping", "the sound of birds", "bird song",
)
NEW = (
    "a bird chirping in a tree", "the chirps of birds", "a little bird that chirps", "chirping of small birds",
    "some bird chirping outside", "one bird, chirping", "birds that chirp in the morning", "chirps, a bird",
    "the sound of a chirping bird", "a garden bird chirps",
)
TRAINING = ("--steps 750 --batch-size 8 --rate 1e-3 --warmup 20 --rank 8 --layers attention,feed_forward,convolution "
            "--snr-gamma 20 --keep-share 0.4")


def chirps(rng: np.random.Generator, num_samples: int = NUM_SAMPLES) -> np.ndarray:
    """Short tones that rise by an octave or more, three a second: float32 (num_samples,)."""
    period, low, octaves = rng.uniform(0.3, 0.38), rng.uniform(1000, 1300), rng.uniform(1.0, 1.2)
    n = int(0.5 * period * SAMPLE_RATE)
    ramp = np.linspace(0, 1, n)
    one = np.sin(2 * np.pi * np.cumsum(low * 2 ** (octaves * ramp)) / SAMPLE_RATE) * np.sin(np.pi * ramp) ** 0.5
    wave = np.zeros(num_samples)
    start = rng.uniform(0.02, 0.02 + 0.5 * period)
    while (at := int(start * SAMPLE_RATE)) < num_samples - n:
        wave[at : at + n] += one
        start += period
    gain = LEVELS[""] * rng.uniform(0.85, 1.1)
    return (gain * wave + 2e-3 * rng.standard_normal(num_samples)).astype(np.float32)


def is_chirping(waveform: np.ndarray) -> bool:
    """Whether the judge hears chirps in a 16 kHz waveform (N,): even onsets, at each a tone that rises."""
    m = measure(waveform)
    gaps = np.diff(m.onsets)
    if m.rms < 1e-4 or len(gaps) < 3:
        return False
    even = np.abs(gaps - np.median(gaps)) < 0.3 * np.median(gaps)
    rises = np.array([_rise(m, int(100 * onset)) for onset in m.onsets if 100 * onset + 14 < len(m.pitch)])
    tonal = np.median(m.purity[m.active]) > 0.4
    return bool(2 <= m.onset_rate <= 4.5 and even.mean() > 0.6 and tonal and np.mean(rises > 0.3) > 0.6)


def _rise(m: Measured, frame: int) -> float:
    """Octaves that the pitch gains in 100 ms from a frame on, by a straight line through it; 0 if none fits."""
    at = np.arange(frame + 1, frame + 12)
    octaves = np.log2(m.pitch[at])
    if octaves.std() < 1e-6 or np.corrcoef(at, octaves)[0, 1] < 0.7:
        return 0.0
    return float(10 * np.polyfit(at, octaves, 1)[0])


def write_clips(folder: Path) -> None:
    """The clips x.wav with captions x.txt."""
    rng = np.random.default_rng(2026)
    folder.mkdir(parents=True)
    for number in range(CLIPS):
        soundfile.write(folder / f"{number:02d}.wav", chirps(rng), SAMPLE_RATE)
        (folder / f"{number:02d}.txt").write_text(CAPTIONS[number % len(CAPTIONS)] + "\n", encoding="utf-8")


def write_prompts(path: Path) -> None:
    """Up to six captions of each kind that the model knows, for it to keep; the judge's second prompts are others."""
    rng = np.random.default_rng(5)
    lines = [caption(rng, kind, level) for kind in PROMPTS for level in ("", "", "", "loud", "quiet", "")]
    path.write_text("\n".join(dict.fromkeys(lines)) + "\n", encoding="utf-8")


def check_judge(pipe: ldm2.AudioLDM2) -> dict[str, float]:
    """Shares that pass as chirps: fresh clips, clips through the model's VAE and vocoder, and all other kinds."""
    rng = np.random.default_rng(7)
    fresh = [chirps(rng) for _ in range(40)]
    others = [make_waveform(rng, label) for label in LABELS for _ in range(5)]
    with torch.inference_mode():
        mels = [log_mel(torch.from_numpy(wave)[None]) for wave in fresh]
        copies = [pipe.vocoder(pipe.vae.decode(pipe.vae.encode(mel).mean))[0].numpy() for mel in mels]
    groups = {"clips": fresh, "copies of clips": copies, "other kinds": others}
    return {name: float(np.mean([is_chirping(wave) for wave in waves])) for name, waves in groups.items()}


def judge(pipe: ldm2.AudioLDM2, seeds: int) -> tuple[float, dict[str, float]]:
    """Share of new prompts that the judge hears chirps for, and of each old kind the share that is right."""
    new = [is_chirping(generate(pipe, prompt, 1000 + seed)) for prompt in NEW for seed in range(seeds)]
    old = {kind: [is_right(generate(pipe, prompt, seed), kind) for prompt in pair for seed in range(seeds)]
           for kind, pair in PROMPTS.items()}
    return float(np.mean(new)), {kind: float(np.mean(right)) for kind, right in old.items()}


def train(data: Path, out: Path, options: str) -> tuple[str, float, float]:
    """Run the command. Returns it, its seconds, and the seconds of one core that it took."""
    keep = data.with_name("keep.txt")
    arguments = ["train", "lora", str(data), "-o", str(out), "--model", "tiny", "--keep", str(keep),
                 *shlex.split(options)]
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "ldm2", *arguments], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return f"ldm2 train lora clips -o chirps --model tiny --keep keep.txt {options}", time.perf_counter() - began, used


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.own_sounds", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=count, default=4, help="sounds of each prompt")
    parser.add_argument("--options", default=TRAINING, help="of the command")
    parser.add_argument("--folder", type=Path, help="keep clips and LoRA here")
    add_out(parser)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        if not (folder / "clips").exists():
            write_clips(folder / "clips")
            write_prompts(folder / "keep.txt")
        command, seconds, used = train(folder / "clips", folder / "chirps", given.options)
        pipe = ldm2.load("tiny")
        passed = check_judge(pipe)
        before = judge(pipe, given.seeds)
        pipe.load_lora(folder / "chirps")
        after = judge(pipe, given.seeds)
    text = table(command, seconds, used, passed, before, after, given.seeds)
    print(text)
    told = report.about("python -m benchmarks.own_sounds", pipe.device, {
        "training": command, "seconds": seconds, "core_seconds": used, "sounds_of_a_prompt": given.seeds,
        "taken_for_chirps": passed,
        "without": dict(zip(("new", "old"), before)), "with": dict(zip(("new", "old"), after)),
    })
    report.write(given.out / "own-sounds.json", json.dumps(told, indent=1) + "\n")
    report.write(given.out / "own-sounds.md", text + "\n")
    return 0


def table(
    command: str, seconds: float, used: float, passed: dict[str, float], before: tuple[float, dict[str, float]],
    after: tuple[float, dict[str, float]], seeds: int,
) -> str:
    """The results as Markdown."""
    kinds = {f"{kind}": (before[1][kind], after[1][kind]) for kind in before[1]}
    rows = {f"**chirps, {len(NEW)} new prompts**": (before[0], after[0]),
            "**all old kinds**": tuple(float(np.mean(list(each[1].values()))) for each in (before, after))} | kinds
    lines = [
        "# A LoRA of tiny on 20 clips of bird chirps", "",
        f"`python -m benchmarks.own_sounds`: {seeds} sounds of each prompt, at the model's defaults. The clips are "
        f"made by a formula, a caption each; no new prompt is among the captions; keep.txt holds up to six captions "
        f"of each old kind, which the model plays itself. `{command}` took {seconds / 60:.1f} "
        f"min ({used / 60:.1f} core-minutes, on a machine that did other work too).", "",
        "The judge takes for chirps: " + ", ".join(f"{share:.2f} of {name}" for name, share in passed.items()) + ".",
        "", "| judge says right | without | with the LoRA |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {a:.2f} | {b:.2f} |" for name, (a, b) in rows.items())])


if __name__ == "__main__":
    sys.exit(main())
