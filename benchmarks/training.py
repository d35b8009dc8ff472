"""LoRA training of a full-size UNet: the step against the same one written with diffusers and peft, and peak memory.

    python -m benchmarks.training                       # step, float32, CPU
    python -m benchmarks.training --memory FOLDER       # and peak memory of the command on a checkpoint that is written
                                                        # there if it is not there (4.5 GB)

Weights are random, sizes those of cvssp/audioldm2; batch 1 of 10.24 s, rank 16 on all attentions, AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import soundfile
import torch
from torch.nn import functional as F

from benchmarks import full_size, report
from benchmarks.arguments import add_out, count
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


def compare(rounds: int) -> dict[str, Any]:
    """Both steps in turn, by the seconds that the process computes: first losses, seconds, and how many times as fast.
    """
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
    return {"losses": losses, "cpu_seconds_a_step": medians, "times_as_fast": statistics.median(ratios),
            "least": min(ratios), "most": max(ratios), "rounds": rounds}


def memory(folder: Path, *words: str) -> float:
    """Peak memory in GB of the public command on a checkpoint in a folder."""
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
    return used.ru_maxrss / 1e6


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    step, lines = found["step"], []
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in step["cpu_seconds_a_step"].items())
    losses = ", ".join(f"{name} {value:.5f}" for name, value in step["losses"].items())
    lines.append(f"A step takes, in CPU time: {seconds}. ldm2 is {step['times_as_fast']:.2f} times as fast "
                 f"({step['least']:.2f} to {step['most']:.2f} in {step['rounds']} rounds in turn). "
                 f"First losses: {losses}.")
    if found["memory"]:
        lines += ["", "| `ldm2 train lora --batch-size 1` | GB at the peak |", "|---|---|"]
        lines += [f"| {words or 'float32'} | {value:.2f} |" for words, value in found["memory"].items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=count, default=3, help="measured steps of each")
    parser.add_argument("--memory", type=Path, metavar="FOLDER", help="measure memory too, on this checkpoint")
    add_out(parser)
    given = parser.parse_args(arguments)
    found: dict[str, Any] = {"step": compare(given.rounds), "memory": {}}
    if given.memory is not None:
        folder = given.memory if given.memory.exists() else full_size.save(given.memory)
        for words in ((), ("--checkpointing",), ("--dtype", "bfloat16"), ("--dtype", "bfloat16", "--checkpointing")):
            found["memory"][" ".join(words)] = memory(folder, *words)
    text = table(found)
    print(text)
    told = report.about(f"python -m benchmarks.training {shlex.join(sys.argv[1:])}".strip(), torch.device("cpu"), {})
    report.write(given.out / "training.json", json.dumps(told | found, indent=1) + "\n")
    lines = [f"- {name}: {value}" for name, value in told.items()]
    report.write(given.out / "training.md", "\n".join(["# Training a LoRA at full size", "", *lines, "", text, ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
