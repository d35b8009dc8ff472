"""How good the bundled tiny model is: `python -m benchmarks.tiny_quality` prints a table per kind and draws a picture.

The judge of `benchmarks.judge` is run on sounds made by formulas (which it must pass, and must not take for other
kinds), on copy synthesis (log-mel -> VAE -> vocoder) and on what the model makes of prompts.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

import ldm2
from benchmarks.arguments import count
from benchmarks.judge import is_right, measure, slope
from ldm2.mel import log_mel
from ldm2.training.tiny.contrast import feature_extractor, features
from ldm2.training.tiny.sounds import LABELS, halves, make_waveform, sounds

# Two ways to ask for each kind that the model was taught; the second one is nowhere among the captions.
PROMPTS: dict[str, tuple[str, str]] = {
    "low tone": ("a low tone", "one long, low tone"),
    "middle tone": ("a middle tone", "a tone of medium pitch"),
    "high tone": ("a high tone", "one long, high tone"),
    "rising sweep": ("a rising sweep", "a tone rising higher and higher"),
    "falling sweep": ("a falling sweep", "a tone falling lower and lower"),
    "siren": ("a siren", "the siren of a police car"),
    "white noise": ("white noise", "plain white noise from a radio"),
    "rumble": ("a deep rumble", "something rumbling deep down"),
    "hiss": ("a bright hiss", "steam hissing from a pipe"),
    "slow clicks": ("slow clicks", "something that clicks slowly"),
    "fast clicks": ("fast clicks", "something that clicks fast"),
    "slow drum": ("a slow drum beat", "somebody beating a drum slowly"),
    "fast drum": ("a fast drum beat", "somebody beating a drum fast"),
    "low bell": ("a low bell", "the ringing of a deep bell"),
    "high bell": ("a high bell", "the ringing of a bright bell"),
    "plucked notes": ("plucked notes", "a guitar plucked note by note"),
    "alarm beeps": ("alarm beeps", "beeps of an alarm clock"),
    "wind": ("wind blowing", "gusts of wind over a field"),
}
SWAPS = (
    ("rising sweep", "falling sweep"), ("slow clicks", "fast clicks"), ("slow drum", "fast drum"),
    ("low tone", "high tone"), ("low bell", "high bell"),
)
LEVELLED = ("low tone", "high tone", "siren", "white noise", "slow drum", "alarm beeps")

Table = dict[str, list[float]]


def real_sounds(count: int) -> tuple[Table, Table]:
    """For each label: which of its own sounds pass, and which sounds of one other label each do."""
    rng = np.random.default_rng(1)
    waves = {label: [make_waveform(rng, label, ("", "loud", "quiet")[i % 3]) for i in range(count)] for label in LABELS}
    own = {label: [float(is_right(wave, label)) for wave in each] for label, each in waves.items()}
    others = {label: [each[0] for other, each in waves.items() if other != label] for label in LABELS}
    return own, {label: [float(is_right(wave, label)) for wave in each] for label, each in others.items()}


def copies(pipe: ldm2.AudioLDM2, count: int) -> tuple[Table, Table, float, float]:
    """Copy synthesis: per kind what passes, and how far the pitch of tones is off in Hz; VAE L1; std of scaled
    latents.
    """
    passed, off, errors, latents = {}, {}, [], []
    with torch.inference_mode():
        for sound in sounds(99, count):
            mel = log_mel(torch.from_numpy(sound.waveform)[None])
            z = pipe.vae.encode(mel).sample(torch.Generator().manual_seed(0))
            decoded = pipe.vae.decode(z)
            errors.append(float((decoded - mel).abs().mean()))
            latents.append(z * pipe.vae.config.scaling_factor)
            wave = pipe.vocoder(decoded)[0, : len(sound.waveform)].numpy()
            passed.setdefault(sound.kind, []).append(float(is_right(wave, sound.kind)))
            if sound.kind.endswith(" tone") and halves(sound.kind) is None:
                distance = abs(np.median(measure(wave).pitch) - np.median(measure(sound.waveform).pitch))
                off.setdefault(sound.kind, []).append(float(distance))
    return passed, off, float(np.mean(errors)), float(torch.cat(latents).std())


def generate(pipe: ldm2.AudioLDM2, prompt: str, seed: int) -> np.ndarray:
    """One waveform (N,) at the model's defaults."""
    return np.asarray(pipe.generate(prompt, seed=seed).waveforms[0]).reshape(-1)


def generations(pipe: ldm2.AudioLDM2, seeds: int) -> tuple[Table, dict[str, list[np.ndarray]]]:
    """Per kind what passes; the waveforms, prompts in the order of PROMPTS."""
    waves = {kind: [generate(pipe, prompt, seed) for prompt in pair for seed in range(seeds)]
             for kind, pair in PROMPTS.items()}
    return {kind: [float(is_right(wave, kind)) for wave in each] for kind, each in waves.items()}, waves


def closeness(wave: np.ndarray, kind: str) -> float:
    """A number that is larger, the more the sound is the first of a pair of SWAPS rather than the second."""
    m = measure(wave)
    if kind.endswith("sweep"):
        return slope(m)[1]
    if kind.endswith(("clicks", "drum")):
        return -m.onset_rate if len(m.onsets) > 1 else 0.0
    return -float(np.median(np.log2(m.pitch[m.active])))


def swapped(waves: dict[str, list[np.ndarray]]) -> Table:
    """For each pair of SWAPS: how often the one caption's sound is nearer to its own kind than the other's, same
    seed.
    """
    return {
        f"{a} / {b}": [float(closeness(x, a) > closeness(y, a)) for x, y in zip(waves[a], waves[b])] for a, b in SWAPS
    }


def levels(pipe: ldm2.AudioLDM2, seeds: int) -> Table:
    """For each kind of LEVELLED: is "loud" at least twice as strong as "quiet"?"""
    def rms(prompt: str, word: str, seed: int) -> float:
        article, rest = ("a ", prompt[2:]) if prompt.startswith("a ") else ("", prompt)
        return float(generate(pipe, f"{article}{word} {rest}", seed).std())

    def louder(prompt: str, seed: int) -> float:
        return float(rms(prompt, "loud", seed) > 2 * rms(prompt, "quiet", seed))
    return {kind: [louder(PROMPTS[kind][0], seed) for seed in range(seeds)] for kind in LEVELLED}


def ranking(folder: Path, waves: dict[str, list[np.ndarray]], passed: Table) -> tuple[float, float]:
    """Share that is right of the best of three by CLAP, and of all."""
    clap = transformers.ClapModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    tokenizer = transformers.RobertaTokenizer.from_pretrained(folder / "tokenizer")
    best, every = [], []
    with torch.inference_mode():
        for kind, each in waves.items():
            half = len(each) // 2
            for first in range(0, half - 2, 3):
                audio = clap.audio_model(features(torch.from_numpy(np.stack(each[first : first + 3])).float(),
                                                  feature_extractor())).pooler_output
                text = clap.text_model(**tokenizer(PROMPTS[kind][0], return_tensors="pt")).pooler_output
                scores = torch.cosine_similarity(clap.audio_projection(audio), clap.text_projection(text))
                best.append(passed[kind][first + int(scores.argmax())])
                every += passed[kind][first : first + 3]
    return float(np.mean(best)), float(np.mean(every))


def show(title: str, table: Table) -> None:
    """Prints a share for each row, then the mean of all and the worst row."""
    print(f"\n{title}")
    for name, values in table.items():
        print(f"  {name:34s} {np.mean(values):5.2f}  ({len(values)})")
    print(f"  {'all':34s} {np.mean([v for values in table.values() for v in values]):5.2f}")
    print(f"  {'worst':34s} {min(np.mean(values) for values in table.values()):5.2f}")


def draw(waves: dict[str, list[np.ndarray]], path: Path) -> None:
    """Log-mels of real sounds beside generated ones, a pair for each kind, as an image file."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    columns, rng = 6, np.random.default_rng(3)
    rows = -(-len(waves) // columns)
    figure, axes = plt.subplots(2 * rows, columns, figsize=(2.2 * columns, 2.6 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, (kind, each) in enumerate(waves.items()):
        for j, wave in enumerate((make_waveform(rng, kind), each[0])):
            axis = axes[2 * (i // columns) + j, i % columns]
            mel = log_mel(torch.from_numpy(np.asarray(wave, dtype=np.float32))[None])[0, 0].T
            axis.imshow(mel, origin="lower", aspect="auto", vmin=-9, vmax=1, cmap="magma")
            axis.set_title(f"{kind} (formula)" if j == 0 else f"\u201c{PROMPTS[kind][0]}\u201d", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=70)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiny_quality", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="name or folder of the model")
    parser.add_argument("--seeds", type=count, default=4, help="generations per prompt")
    parser.add_argument("--picture", type=Path, help="write spectrograms to this file")
    given = parser.parse_args(arguments)
    pipe = ldm2.load(given.model)
    folder = Path(ldm2.__file__).parent / "tiny" if given.model == "tiny" else Path(given.model)
    own, wrong = real_sounds(12)
    show("real sounds pass", own)
    show("sounds of other kinds pass", wrong)
    passed, off, error, spread = copies(pipe, 150)
    show("copy synthesis passes", passed)
    show("tones on pitch within 60 Hz", {kind: [float(hertz < 60) for hertz in each] for kind, each in off.items()})
    print(f"\nVAE log-mel L1 {error:.3f}; std of scaled latents {spread:.2f}")
    started = time.perf_counter()
    passed, waves = generations(pipe, given.seeds)
    seconds = (time.perf_counter() - started) / sum(map(len, waves.values()))
    show("generations pass", passed)
    print(f"\n{seconds:.2f} s for a clip")
    show("swapped captions: the right one wins", swapped(waves))
    show("loud is twice quiet", levels(pipe, given.seeds))
    if given.seeds < 3:
        print("\nbest of three by CLAP: not judged, it needs --seeds 3 or more")
    else:
        best, every = ranking(folder, waves, passed)
        print(f"\nbest of three by CLAP {best:.2f}, a random one of them {every:.2f}")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    print(f"{size:.1f} MB")
    if given.picture is not None:
        draw(waves, given.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
