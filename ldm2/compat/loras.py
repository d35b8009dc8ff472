"""LoRAs by the names that diffusers' pipelines have for it (its AudioLDM2Pipeline has none)."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from ldm2.compat.components import Components

IGNORED = ("use_safetensors", "local_files_only", "cache_dir", "low_cpu_mem_usage", "torch_dtype", "token")


class WithLoras(Components):
    """A pipeline whose LoRAs are merged into its weights: what diffusers calls fused is so from the beginning."""

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: str | PathLike, adapter_name: str | None = None, *,
        weight_name: str | None = None, subfolder: str | None = None, **more: Any,
    ) -> None:
        """Load a LoRA from a file, or from a folder (in it weight_name, default what peft and diffusers write).

        Raises ValueError or OSError, one line, for tensors that are in no file, and for what does not fit.
        """
        unknown = sorted(set(more) - set(IGNORED))
        if unknown:
            raise ValueError(f"load_lora_weights takes no {', '.join(unknown)}")
        given = pretrained_model_name_or_path_or_dict
        if not isinstance(given, (str, PathLike)):
            raise ValueError(f"a LoRA is read from its file or folder, got {type(given).__name__}: save it first")
        path = Path(fspath(given)).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"the LoRA {path} does not exist (repositories on the hub: download them first)")
        self._model.load_lora(path.joinpath(*filter(None, (subfolder, weight_name))), name=adapter_name)

    def unload_lora_weights(self) -> None:
        """Take out all LoRAs."""
        self._model.unload_lora()

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] = 1.0) -> None:
        """Let these LoRAs count, each by its weight, and no others."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = list(adapter_weights) if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise ValueError(f"adapter_weights must be one number or one for each of {len(names)}, got {len(weights)}")
        self._model.adapters.rescale(dict.fromkeys(self._scales(), 0.0) | dict(zip(names, weights)))

    def get_active_adapters(self) -> list[str]:
        """The names of the LoRAs that count."""
        return [name for name, scale in self._scales().items() if scale]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The names of all LoRAs, by the part that they change."""
        found: dict[str, list[str]] = {}
        for name, entry in self._model.adapters.standing.items():
            for part in entry.adapter.parts:
                found.setdefault(part, []).append(name)
        return found

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take out LoRAs by their names."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._model.unload_lora(name)

    def fuse_lora(self, *_: Any, lora_scale: float = 1.0, **__: Any) -> None:
        """Let what counts count `lora_scale` times; it is merged into the weights already."""
        self._model.adapters.rescale({name: scale * lora_scale for name, scale in self._scales().items()})

    def unfuse_lora(self, *_: Any, **__: Any) -> None:
        """Accepted without effect: what is merged is taken out by unload_lora_weights, bit by bit."""

    def _scales(self) -> dict[str, float]:
        return {name: entry.scale for name, entry in self._model.adapters.standing.items()}
