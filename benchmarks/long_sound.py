"""Sounds beyond the model's own length: does time grow no faster than the length, does memory stay, do loops close?

    python -m benchmarks.long_sound [--model NAME] [--steps N] [--short 10] [--long 120] [--loops N] [--tiles]

Each length runs in a process of its own, so that the peak of its memory is its own. Peak memory is what the generation
adds to the process with the model loaded and warmed up (resident set on a CPU, allocated memory on a GPU). On a CPU the
time is CPU time on one thread, which other processes disturb least.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import numpy as np

from benchmarks.arguments import count, positive

PROMPT = "white noise"


def measure(model: str, seconds: float, steps: int, device: str) -> dict:
    """Time in s and memory in bytes (None where the system does not tell) of one generation, after a short one that
    warms up."""
    import torch

    import ldm2
    from ldm2.runtime import profiling

    torch.set_num_threads(1)
    pipe = ldm2.load(model, device=device)
    pipe.generate(PROMPT, seconds=1.0, steps=1, seed=0)
    clock = time.perf_counter if pipe.device.type == "cuda" else time.process_time
    times = []

    def run() -> None:
        times.append(clock())
        pipe.generate(PROMPT, seconds=seconds, steps=steps, seed=0)
        times.append(clock())

    memory = profiling.memory_of(run, pipe.device)
    return {"seconds": seconds, "time": times[1] - times[0], "memory": memory}


def apart(model: str, seconds: float, steps: int, device: str) -> dict:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.long_sound", "--model", model, "--steps", str(steps),
               "--device", device, "--measure", str(seconds)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def joint_ranks(waveform: np.ndarray, sample_rate: int) -> dict[str, float]:
    """Where the joint of a loop (N,) stands among all its places, 0 (smoothest) to 1 (roughest), by three measures.

    level: jump of the log level between 20 ms before and after. phase: error of continuing the samples by a line
    through the last two. spectrum: mean difference of the log spectra, in bands of 100 Hz, of 20 ms before and after.
    """
    hop, span = sample_rate // 200, sample_rate // 50
    places = np.arange(0, len(waveform) - hop + 1, hop)                      # the joint is place 0
    around = np.concatenate([waveform[-span:], waveform, waveform[:span]])
    before = np.stack([around[p : p + span] for p in places])
    after = np.stack([around[p + span : p + 2 * span] for p in places])

    def level(x: np.ndarray) -> np.ndarray:
        return np.log(np.sqrt((x**2).mean(axis=1)) + 1e-5)

    def bands(x: np.ndarray) -> np.ndarray:
        power = np.abs(np.fft.rfft(x * np.hanning(span), axis=1))[:, : span // 2] ** 2
        return np.log(power.reshape(len(x), -1, 2).mean(axis=2) + 1e-6)

    kink = np.abs(waveform - 2 * np.roll(waveform, 1) + np.roll(waveform, 2))
    kink = np.maximum(kink, np.roll(kink, -1))                               # the sample at a place and the next
    measures = {
        "level": np.abs(level(after) - level(before)),
        "phase": kink,
        "spectrum": np.abs(bands(after) - bands(before)).mean(axis=1),
    }
    return {name: float((values[1:] < values[0]).mean()) for name, values in measures.items()}


def loops(model: str, steps: int, count: int, device: str) -> dict[str, dict[str, float]]:
    """Mean rank of the joint over several sounds, and the share of them beyond the 95th percentile: loops, and not."""
    import ldm2

    pipe = ldm2.load(model, device=device)
    seconds = 1.5 * pipe.native_latent_frames * pipe.samples_per_latent_frame / pipe.sample_rate
    table = {}
    for loop in (True, False):
        sounds = [pipe.generate(PROMPT, seconds=seconds, steps=steps, seed=seed, loop=loop) for seed in range(count)]
        ranks = [joint_ranks(sound.waveforms[0], sound.sample_rate) for sound in sounds]
        for name in ranks[0]:
            values = np.array([rank[name] for rank in ranks])
            row = f"{'looped' if loop else 'not looped'}, {name}"
            table[row] = {"mean rank": values.mean(), "beyond 95 %": (values > 0.95).mean()}
    return table


def tiles(model: str, device: str) -> list[str]:
    """What the VAE's decoder loses by tiles, in log-mel: lines that compare them with everything decoded at once."""
    import torch

    import ldm2
    from ldm2 import audio
    from ldm2.edit.sound import analyze
    from ldm2.training.tiny.sounds import SAMPLE_RATE, sounds

    pipe = ldm2.load(model, device=device)
    sound = np.concatenate([item.waveform for item in sounds(seed=0, count=16)])                    # 41 s
    sound = audio.resample(sound, SAMPLE_RATE, pipe.sample_rate)
    latents = pipe.encode_audio(sound, pipe.sample_rate)
    whole = pipe.decode(latents, tile=latents.shape[2]).float()

    def line(name: str, mel: torch.Tensor) -> str:
        gap = (mel.float() - whole).abs()
        return f"{name:>22}: mean {gap.mean():.2f}, at most {gap.max():.2f}"

    rows = [line(f"tiles of {tile} frames", pipe.decode(latents, tile=tile)) for tile in (256, 64)]
    return [*rows, line("the sound itself", analyze(pipe, sound[None]))]


def table(short: dict, long: dict) -> str:
    """Two results of `measure`, and their ratios."""
    lines = [f"{'sound':>8} {'time':>9} {'per second':>11} {'peak memory':>12}"]
    for row in (short, long):
        memory = "not known" if row["memory"] is None else f"{row['memory'] / 1e6:.1f} MB"
        lines.append(f"{row['seconds']:6.0f} s {row['time']:7.2f} s {row['time'] / row['seconds']:9.4f} s {memory:>12}")
    time_ratio = long["time"] / long["seconds"] / (short["time"] / short["seconds"])
    memory_ratio = f"{long['memory'] / short['memory']:.2f}x" if short["memory"] and long["memory"] else ""
    return "\n".join([*lines, f"{'ratio':>8} {'':>9} {time_ratio:10.2f}x {memory_ratio:>12}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=count, default=10)
    parser.add_argument("--short", type=positive, default=10.0)
    parser.add_argument("--long", type=positive, default=120.0)
    parser.add_argument("--loops", type=int, default=0, metavar="N", help="also judge the joints of N loops")
    parser.add_argument("--tiles", action="store_true", help="only say what the VAE's decoder loses by tiles")
    parser.add_argument("--measure", type=positive, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(args.model, args.measure, args.steps, args.device)))
        return
    if args.tiles:
        print("difference from the VAE's decoding of everything at once, in log-mel")
        print("\n".join(tiles(args.model, args.device)))
        return
    print(table(*(apart(args.model, seconds, args.steps, args.device) for seconds in (args.short, args.long))))
    if args.loops:
        for row, values in loops(args.model, args.steps, args.loops, args.device).items():
            print(f"{row:>22}: " + ", ".join(f"{name} {value:.2f}" for name, value in values.items()))


if __name__ == "__main__":
    main()
