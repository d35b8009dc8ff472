"""The command `ldm2 doctor`: what this machine is, and whether ldm2 is well on it."""

from __future__ import annotations

import argparse
import json


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser's."""
    command = commands.add_parser(
        "doctor", help="check this machine: versions, kernels, speed, cache",
        description="Versions, processor and GPU; which kernels run and why others do not; each kernel compared with "
        "plain PyTorch here and now; speed; state of the cache, the hub and the disk. Takes 10 to 20 seconds.",
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of lines")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Examine and print. Raises ArithmeticError if a kernel does not compute what it should."""
    from ldm2.runtime import doctor

    found = doctor.examine()
    print(json.dumps(found, indent=1) if args.json else "\n".join(lines(found)))
    faults = doctor.faults(found)
    if faults:
        raise ArithmeticError("; ".join(faults))


def lines(found: dict) -> list[str]:
    """The findings for people."""
    about, hub = found["machine"], found["hub"]
    versions = [f"{name} {version or '-'}" for name, version in found["versions"].items()]
    result = [
        "versions: " + ", ".join(versions),
        f"processor: {about['cpu']}, {about['cores']} cores, {about['threads']} threads, {about['vector_units']} "
        f"(PyTorch uses {about['torch_capability']})",
        f"memory: {_size(about['memory_free'])} free of {_size(about['memory'])}",
    ]
    result += [_gpu(row) for row in found["gpu"]] or ["GPU: none that PyTorch finds"]
    if found["environment"]:
        result.append("environment: " + ", ".join(f"{name}={value}" for name, value in found["environment"].items()))
    result += ["", *_kernels(found["kernels"]), ""]
    result += [f"speed on {row['device']} in {row['dtype']}: matrix products {row['flop_rate'] / 1e9:.0f} GFLOP/s, "
               f"copies {row['copy_rate'] / 1e9:.1f} GB/s" for row in found["speed"]]
    here = ", ".join(hub["checkpoints"]) or "no known checkpoint"
    result += ["", f"cache: {hub['cache']} holds {here}", f"hub: {hub['endpoint']} {hub['state']}"]
    return result + [f"disk, {row['place']}: {_size(row['free'])} free at {row['path']}" for row in found["disk"]]


def _gpu(row: dict) -> str:
    if "memory" not in row:
        return f"GPU: {row['name']}"
    return (f"GPU: {row['name']}, capability {row['capability']}, {_size(row['memory_free'])} free of "
            f"{_size(row['memory'])}, CUDA {row['cuda']}, cuDNN {row['cudnn']}")


def _kernels(rows: list[dict]) -> list[str]:
    """A table: operation, which kernel, error as a share of what is allowed by dtype."""
    cells = [("operation", "on", "kernel", "error as a share of what is allowed")]
    for row in rows:
        shares = [f"{dtype} {'left to PyTorch' if share is None else format(share, '.2f')}"
                  for dtype, share in row["shares"].items() if dtype not in row["faults"]]
        told = [*shares, *(f"{dtype} FAILS: {fault}" for dtype, fault in row["faults"].items())]
        kernel = row["kernel"] or f"PyTorch's ({row['why']})"
        cells.append((row["operation"], row["device"], kernel, ", ".join(told)))
    widths = [max(len(row[column]) for row in cells) for column in range(3)] + [0]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]


def _size(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e9:.1f} GB"
