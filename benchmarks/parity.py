"""How far each fast path is from the plain one, and both from float64: latents of the same noise and conditioning.

    python -m benchmarks.parity [--size base|large|tiny] [--steps 20] [--dtypes float32,bfloat16] [--device cpu]

The text is encoded once, in float32; then the UNet and the sampler run in float64 and in each dtype: in plain PyTorch,
by the fused kernels (where there are any for the device), and in diffusers' pipeline. Distances are relative: the norm
of the difference over that of float64's latents. A fast path may be as far from the plain one as 2e-4 in float32, and
in other dtypes no further from float64 than twice diffusers' distance.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import ldm2
from benchmarks import report
from benchmarks.__main__ import SIZES, checkpoint
from benchmarks.arguments import add_out, count, positive
from benchmarks.rows import PROMPT, SCALE
from ldm2 import ops
from ldm2.conditioning import Conditioning
from ldm2.noise import SeededNoise
from ldm2.pipeline import AudioLDM2
from ldm2.runtime.device import choose_device, choose_dtype
from ldm2.settings import Sampling, Settings


def as_dtype(pipe: AudioLDM2, dtype: torch.dtype) -> AudioLDM2:
    """The same pipeline with a UNet of another dtype; the other parts are shared."""
    other = copy.copy(pipe)
    other.unet, other.dtype = copy.deepcopy(pipe.unet).to(dtype), dtype
    return other


def their_latents(pipeline, sides: tuple[Conditioning, Conditioning], noise: Tensor, seconds: float, steps: int,
                  dtype: torch.dtype) -> Tensor:
    """Latents of diffusers' pipeline from conditionings that are encoded already."""
    sides = [side.to(noise.device, dtype) for side in sides]
    words, generated = ([side.contexts[i] for side in sides] for i in (1, 0))
    masks = [side.masks[1] for side in sides]
    return pipeline(
        audio_length_in_s=seconds, num_inference_steps=steps, guidance_scale=SCALE, latents=noise.to(dtype),
        prompt_embeds=words[0], negative_prompt_embeds=words[1], attention_mask=masks[0],
        negative_attention_mask=masks[1], generated_prompt_embeds=generated[0],
        negative_generated_prompt_embeds=generated[1], output_type="latent",
    ).audios


def distance(latents: Tensor, other: Tensor) -> float:
    """|latents - other| / |other|."""
    return float((latents.double() - other.double()).norm() / other.double().norm())


def measure(folder: Path, device: torch.device, dtypes: list[torch.dtype], seconds: float, steps: int,
            tell: Callable[[str], object]) -> Iterator[dict]:
    """A row for each way to compute: its distance to float64, and to the plain path of its dtype."""
    from benchmarks import checkpoints

    pipe = ldm2.load(folder, reference="diffusers", device=str(device), dtype="float32")
    sampling = Sampling(steps=steps, guidance_scale=SCALE)
    sides = pipe.conditionings(Settings(PROMPT, guidance_scale=SCALE).resolved())
    noise = SeededNoise([0]).draw(*pipe.latent_shape(seconds))

    def ours(dtype: torch.dtype, backend: str) -> Tensor:
        tell(f"{str(dtype)[6:]}, {backend} ...")
        with ops.backend(backend):
            made = as_dtype(pipe, dtype).denoise(*sides, noise, sampling)
        return made.cpu()

    exact = ours(torch.float64, "reference")
    for dtype in dtypes:
        plain = ours(dtype, "reference")
        yield {"dtype": str(dtype)[6:], "way": "ldm2, plain PyTorch", "float64": distance(plain, exact)}
        fast = ours(dtype, "auto")
        yield {"dtype": str(dtype)[6:], "way": "ldm2", "float64": distance(fast, exact), "plain": distance(fast, plain)}
        tell(f"{str(dtype)[6:]}, diffusers ...")
        theirs = their_latents(checkpoints.diffusers_pipeline(folder, dtype).to(device), sides, noise.to(device),
                               seconds, steps, dtype).cpu()
        yield {"dtype": str(dtype)[6:], "way": "diffusers", "float64": distance(theirs, exact),
               "plain": distance(theirs, plain)}


def markdown(about: dict, rows: list[dict]) -> str:
    """The table."""
    lines = [
        f"{about['machine']} ({about['cores']} cores, {about['vector_units']}), {about['device']}, model "
        f"{about['size']}, {about['seconds']:g} s, {about['steps']} DDIM steps, guidance {SCALE:g}, torch "
        f"{about['torch']}, diffusers {about['diffusers']}", "", f"`{about['command']}`", "",
        "Relative distances of the latents.", "", "| dtype | | to float64 | to plain PyTorch |", "|---|---|---|---|",
    ]
    for row in rows:
        plain = f"{row['plain']:.1e}" if "plain" in row else ""
        lines.append(f"| {row['dtype']} | {row['way']} | {row['float64']:.1e} | {plain} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--folder", type=Path, help="checkpoint, written if it is not there (default: build/random-*)")
    parser.add_argument("--steps", type=count, default=20)
    parser.add_argument("--seconds", type=positive, default=10.24)
    parser.add_argument("--dtypes", default="float32", help="with commas between them (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=count, help="of torch on the CPU")
    add_out(parser)
    args = parser.parse_args(arguments)
    try:
        device = choose_device(args.device)
        dtypes = [choose_dtype(name, device) for name in args.dtypes.split(",")]
    except ValueError as error:
        parser.error(str(error))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    folder = checkpoint(args)
    if folder is None:
        parser.error("it compares with diffusers: pip install diffusers")
    about = report.about(shlex.join(["python", "-m", "benchmarks.parity", *sys.argv[1:]]), device,
                         {"size": args.size, "seconds": args.seconds, "steps": args.steps})
    rows = []
    for row in measure(folder, device, dtypes, args.seconds, args.steps, lambda line: print(line, file=sys.stderr)):
        rows.append(row)
        path = report.write(args.out / "parity.md", markdown(about, rows))   # a run that is stopped has told it
    print(markdown(about, rows), path, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
