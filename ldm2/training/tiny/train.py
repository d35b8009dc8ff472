"""Trains the bundled tiny model: `python -m ldm2.training.tiny --out DIR --minutes N`.

Stage after stage: sounds, VAE, CLAP, the rest of the text side, vocoder, and last, with most of the time, UNet and
text side together. DIR/checkpoint then holds the model in the published layout; DIR/log.jsonl has the losses on
held-out sounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch import Tensor, nn

from ldm2.config import UNetConfig, VAEConfig, VocoderConfig
from ldm2.schedules import Schedule
from ldm2.training import autoencoder, diffusion
from ldm2.training.loop import Clock, OutOfTime, Recipe
from ldm2.training.tiny import contrast, vocoding
from ldm2.training.tiny.data import Pool, formula_pool
from ldm2.training.tiny.export import SCHEDULER, export
from ldm2.training.tiny.sounds import KINDS, all_captions
from ldm2.training.tiny.text import (
    Describer,
    TextSide,
    byte_pair_tokenizer,
    clap_model,
    descriptions,
    train_description,
)
from ldm2.unet import UNet
from ldm2.vae import VAE
from ldm2.vocoder import Vocoder

VAE_FIELDS: dict[str, Any] = {
    "in_channels": 1, "out_channels": 1, "latent_channels": 4, "block_out_channels": [8, 24, 48], "layers_per_block": 1,
    "norm_num_groups": 4, "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
    "scaling_factor": 1.0,
}
VOCODER_FIELDS: dict[str, Any] = {
    "model_in_dim": 64, "sampling_rate": 16_000, "upsample_initial_channel": 256, "upsample_rates": [1, 1, 160],
    "upsample_kernel_sizes": [3, 3, 320], "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]],
    "leaky_relu_slope": 0.1, "normalize_before": False,
}
UNET_FIELDS: dict[str, Any] = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": [24, 32, 64, 72],
    "layers_per_block": 1, "transformer_layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "cross_attention_dim": [[None, 64, 64]] * 4, "attention_head_dim": [3, 4, 4, 4], "norm_num_groups": 8,
}
DEFAULTS = {"seconds": 2.56, "steps": 25, "guidance_scale": 2.5, "sampler": "ddim"}

# What the diffusion model is taught, and how often against the others. VAE and vocoder hear all the labels there are.
SHARES = {kind: 1 for kind in KINDS if kind != "rain"} | {"rising sweep": 2, "falling sweep": 2}

_FULL = 120                                # minutes for which the steps below are meant, on two cores
_STEPS = {
    "vae": 2300, "clap": 350, "description": 300, "vocoder_front": 500, "vocoder": 2000, "clap_audio": 200,
    "diffusion": 5000,
}
_CLIPS, _HELD_OUT, _ENCODED, _DECODED = 12_000, 256, 8000, 700


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the command line asks for."""

    out: Path
    minutes: float
    seed: int
    device: str
    processes: int
    deadline: float | None                 # time.monotonic(), of this piece
    progress: bool = True

    @property
    def clock(self) -> Clock:
        return Clock(self.out, self.deadline, self.progress)

    def recipe(self, stage: str, rate: float, **changes: float) -> Recipe:
        """The stage's share of the minutes, in steps."""
        steps = max(round(_STEPS[stage] * self.minutes / _FULL), 4)
        return Recipe(steps=steps, rate=rate, seed=self.seed, warmup=max(min(100, steps // 4), 1), **changes)

    def clips(self) -> tuple[Pool, Pool]:
        """Training and held-out clips; fewer than 12 000 in a run of less than ten minutes."""
        count = _CLIPS if self.minutes >= 10 else 500
        return formula_pool(self.seed, count, self.out / "pool.pt", self.processes).split(_HELD_OUT)


def fresh(plan: Plan, module: nn.Module) -> nn.Module:
    return module.to(plan.device)


def prepare_vae(plan: Plan, pool: Pool, held_out: Pool) -> VAE:
    """Trained VAE with its scaling factor."""
    torch.manual_seed(plan.seed)
    vae = fresh(plan, VAE(VAEConfig.from_dict(VAE_FIELDS)))
    autoencoder.start(vae)
    autoencoder.train_vae(vae, pool, held_out, plan.recipe("vae", 3e-3, decay_from=0.4, average=0.995), plan.clock)
    return vae.eval()


def latents_of(plan: Plan, vae: VAE, pool: Pool, held_out: Pool) -> tuple[Tensor, Tensor]:
    """Sampled latents, not scaled, of the first clips of both pools; kept in a file."""
    path = plan.out / "latents.pt"
    if not path.exists():
        mels = pool.mels[:_ENCODED], held_out.mels
        torch.save([autoencoder.encode_all(vae, part, plan.seed + i) for i, part in enumerate(mels)], path)
    return tuple(torch.load(path, weights_only=True))


def prepare_text(plan: Plan, pool: Pool, held_out: Pool) -> tuple[transformers.ClapModel, Describer]:
    """CLAP, trained, and a text side that describes captions."""
    torch.manual_seed(plan.seed)
    captions = all_captions()
    tokenizer = byte_pair_tokenizer(captions, 512)
    clap = fresh(plan, clap_model(tokenizer))
    recipe = plan.recipe("clap", 2e-3, decay_from=0.4, average=0.98)
    contrast.train_clap(clap, tokenizer, pool, held_out, recipe, plan.clock)
    describer = fresh(plan, Describer(TextSide(captions, clap.eval(), tokenizer)))
    recipe = plan.recipe("description", 2e-3, decay_from=0.4, average=0.98)
    train_description(describer, pool, held_out, recipe, plan.clock)
    return clap, describer


def prepare_vocoder(plan: Plan, decoded: Tensor, pool: Pool, held_out: Pool) -> Vocoder:
    """Solved, then taught, then tuned."""
    torch.manual_seed(plan.seed)
    vocoder = Vocoder(VocoderConfig.from_dict(VOCODER_FIELDS))
    vocoding.start(vocoder)
    vocoding.solve_front(vocoder, pool)
    fresh(plan, vocoder)
    recipe = plan.recipe("vocoder_front", 5e-4, average=0.98)
    vocoding.train_front(vocoder, pool, held_out, recipe, plan.clock, decoded)
    vocoding.train_spectra(vocoder, pool, held_out, plan.recipe("vocoder", 4e-4, average=0.98), plan.clock, decoded)
    return vocoder.eval()


@torch.no_grad()
def in_parts(module: Callable[[Tensor], Tensor], inputs: Tensor, plan: Plan) -> Tensor:
    """The module's results for all rows, sixteen at a time, on the CPU in float32."""
    return torch.cat([module(part.to(plan.device).float()).cpu() for part in inputs.split(16)])


def prepare_diffusion(
    plan: Plan, rank: int, describer: Describer, scaling: float, latents: tuple[Tensor, Tensor],
    captions: tuple[list[str], list[str]], labels: tuple[list[str], list[str]], targets: Tensor,
) -> diffusion.TextToLatents:
    """UNet and text side, trained together; one of `plan.processes` processes, each with a batch of its own."""
    if plan.processes > 1:
        torch.set_num_threads(1)
        address = f"file://{(plan.out / 'meeting').resolve()}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=plan.processes)
    torch.manual_seed(plan.seed)
    model = fresh(plan, diffusion.TextToLatents(UNet(UNetConfig.from_dict(UNET_FIELDS)), describer))
    chosen = [[i for i in range(len(z)) for _ in range(SHARES.get(names[i], 0))] for z, names in zip(latents, labels)]
    scaled = [z[rows].float() * scaling for z, rows in zip(latents, chosen)]
    texts = [[words[i] for i in rows] for words, rows in zip(captions, chosen)]
    recipe = plan.recipe("diffusion", 1.2e-3, average=0.9985)
    try:
        diffusion.train_diffusion(
            model, scaled[0], texts[0], targets[chosen[0]], scaled[1], texts[1], Schedule.from_dict(SCHEDULER), recipe,
            plan.clock, batch_size=24 // plan.processes)
    finally:
        if plan.processes > 1:
            dist.destroy_process_group()
    return model


def _worker(rank: int, plan: Plan, *rest: Any) -> None:
    """A process of its own, whose result is the file that the loop keeps. A piece that is over is no failure."""
    try:
        prepare_diffusion(plan, rank, *rest)
    except OutOfTime:
        return


def run(plan: Plan) -> Path:
    """All stages; those that are finished are only read. Returns the checkpoint's folder. Raises OutOfTime."""
    pool, held_out = plan.clips()
    vae = prepare_vae(plan, pool, held_out)
    latents = latents_of(plan, vae, pool, held_out)
    autoencoder.measure_scaling(vae, latents[0])
    clap, describer = prepare_text(plan, pool, held_out)
    decoded = in_parts(vae.decode, latents[0][:_DECODED], plan)
    vocoder = prepare_vocoder(plan, decoded, pool, held_out)
    copies = in_parts(vocoder, decoded, plan)
    recipe = plan.recipe("clap_audio", 1e-3, average=0.98)
    contrast.train_clap(clap, describer.text.clap.tokenizer, pool, held_out, recipe, plan.clock, copies)
    clap.eval()
    plan.clock.check()
    words = (pool.captions, held_out.captions), (pool.labels, held_out.labels)
    rest = (describer, vae.config.scaling_factor, latents, *words, descriptions(pool))
    if plan.processes > 1:
        (plan.out / "meeting").unlink(missing_ok=True)
        mp.spawn(_worker, (plan, *rest), nprocs=plan.processes)
        plan = dataclasses.replace(plan, processes=1)
        plan.clock.check()
    model = prepare_diffusion(plan, 0, *rest)
    folder = plan.out / "checkpoint"
    export(folder, model.unet, UNET_FIELDS, vae, VAE_FIELDS, vocoder, VOCODER_FIELDS, clap, model.text, DEFAULTS)
    return folder


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 finished, 3 the piece's time is over, 2 bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m ldm2.training.tiny", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--minutes", type=float, default=_FULL, help="how much to train in all, on two cores (120)")
    parser.add_argument("--piece", type=float, help="stop after this many minutes; --resume goes on")
    parser.add_argument("--resume", action="store_true", help="go on with what is in the folder")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--processes", type=int, default=1, help="share sounds and the last stage")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.minutes <= 0 or given.processes < 1 or (given.piece is not None and given.piece <= 0):
        got = f"{given.minutes}, {given.piece}, {given.processes}"
        parser.error(f"minutes, piece and processes must be positive, got {got}")
    if given.processes > 1 and given.device != "cpu":
        parser.error(f"several processes are for the cpu, got --device {given.device}")
    if (given.out / "pool.pt").exists() and not given.resume:
        parser.error(f"{given.out} holds a training already; give --resume to go on with it")
    given.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    deadline = None if given.piece is None else time.monotonic() + 60 * given.piece
    plan = Plan(given.out, given.minutes, given.seed, given.device, given.processes, deadline, sys.stderr.isatty())
    try:
        folder = run(plan)
    except OutOfTime:
        print(f"This piece is over; go on with: python -m ldm2.training.tiny --out {given.out} "
              f"--minutes {given.minutes:g} --seed {given.seed} --resume")
        return 3
    print(f"The model is in {folder}; try: ldm2 generate 'a rising sweep' --model {folder}")
    return 0
