"""LoRA training of a full-size UNet: the step against the same one written with diffusers and peft, and peak memory.

    python -m benchmarks.training                       # step, float32, CPU
    python -m benchmarks.training --memory FOLDER       # peak memory of the command; FOLDER: see benchmarks.full_size

Weights are random, sizes those of cvssp/audioldm2; batch 1 of 10.24 s, rank 16 on all attentions, AdamW.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import peft
import soundfile
import torch
from torch.nn import functional as F

from benchmarks import full_size
from benchmarks.arguments import count
from ldm2 import weights
from ldm2.conditioning import Conditioning
from ldm2.config import UNetConfig
from ldm2.schedules import Schedule
from ldm2.training import outcome
from ldm2.training.batches import Batch
from ldm2.training.objective import add_noise, step_weights
from ldm2.training.options import LORA, Training
from ldm2.unet import UNet

RANK, TOKENS = 16, 16
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def batch() -> Batch:
    """One clip, noised half way."""
    generator = torch.Generator().manual_seed(0)
    latents, eps = (torch.randn(1, 8, 256, 16, generator=generator) for _ in range(2))
    contexts = tuple(torch.randn(1, length, width, generator=generator) for length, width in ((8, 768), (TOKENS, 1024)))
    return Batch(latents, eps, torch.tensor([500]), Conditioning(contexts, (None, None)), torch.tensor([False]))


def theirs(unet: diffusers.AudioLDM2UNet2DConditionModel) -> Callable[[], float]:
    """A step with diffusers and peft; returns its loss."""
    unet.requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS), unet)
    scheduler = diffusers.DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer, rows = torch.optim.AdamW(trained, lr=1e-4), batch()
    masks = [torch.ones(context.shape[:2], dtype=torch.bool) for context in rows.conditioning.contexts]
    a = scheduler.alphas_cumprod[rows.t]

    def step() -> float:
        x_t = scheduler.add_noise(rows.x_0, rows.eps, rows.t)
        first, second = rows.conditioning.contexts
        predicted = unet(x_t, rows.t, first, encoder_hidden_states_1=second, encoder_attention_mask=masks[0],
                         encoder_attention_mask_1=masks[1]).sample
        loss = (F.mse_loss(predicted, rows.eps) * step_weights("epsilon", a, 5.0)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
    return step


def ours(unet: UNet, schedule: Schedule) -> Callable[[], float]:
    """The same step here."""
    trained = [p for p in outcome.prepare(unet, Training(LORA, rank=RANK).resolved()).module.parameters()]
    optimizer, rows = torch.optim.AdamW(trained, lr=1e-4), batch()
    a = torch.as_tensor(schedule.alphas_cumprod, dtype=torch.float32)[rows.t]

    def step() -> float:
        predicted = unet(add_noise(rows.x_0, rows.eps, a), rows.t, rows.conditioning)
        loss = (((predicted - rows.eps) ** 2).mean(dim=(1, 2, 3)) * step_weights("epsilon", a, 5.0)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
    return step


def compare(rounds: int) -> str:
    """Both steps in turn, by the seconds that the process computes. Returns a line of Markdown."""
    unet = full_size.unet()
    fields = {**unet.config, "attention_head_dim": list(unet.config.attention_head_dim)
              if isinstance(unet.config.attention_head_dim, (list, tuple)) else unet.config.attention_head_dim}
    with weights.on_meta():
        mine = UNet(UNetConfig.from_dict(fields, "unet", "diffusers"))
    weights.load(mine, {name: p.detach() for name, p in unet.state_dict().items()})
    schedule = Schedule(1000, 0.0015, 0.0195, "scaled_linear")
    steps = {"diffusers and peft": theirs(unet), "ldm2": ours(mine, schedule)}
    losses: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = time.process_time()
            loss = step()
            if number == 0:
                losses[name] = loss
            else:
                seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    ratios = [a / b for a, b in zip(*seconds.values())]
    return (f"first losses {losses}; CPU seconds a step: " + ", ".join(f"{n} {s:.1f}" for n, s in medians.items())
            + f"; ldm2 is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f}, "
            f"{rounds} rounds, {torch.get_num_threads()} threads)")


def memory(folder: Path, *words: str) -> str:
    """Peak memory of the public command on a checkpoint in a folder. Returns a line of Markdown."""
    with tempfile.TemporaryDirectory() as scratch:
        clips = Path(scratch) / "clips"
        clips.mkdir()
        wave = 0.1 * np.random.default_rng(0).standard_normal(160_000).astype(np.float32)
        soundfile.write(clips / "a.wav", wave, 16_000)
        (clips / "a.txt").write_text("a dog barking in the rain")
        command = [sys.executable, "-m", "ldm2", "train", "lora", str(clips), "-o", f"{scratch}/out", "--model",
                   str(folder), "--batch-size", "1", "--steps", "3", "-q", *words]
        process = subprocess.Popen(command)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"the training failed: {' '.join(command)}")
    return f"{' '.join(words) or 'float32'}: {used.ru_maxrss / 1e6:.2f} GB at the peak"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=count, default=3, help="measured steps of each")
    parser.add_argument("--memory", type=Path, metavar="FOLDER", help="measure memory instead, on this checkpoint")
    given = parser.parse_args(arguments)
    if given.memory is None:
        print(compare(given.rounds), flush=True)
        return 0
    for words in ((), ("--checkpointing",), ("--dtype", "bfloat16"), ("--dtype", "bfloat16", "--checkpointing")):
        print(memory(given.memory, *words), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
