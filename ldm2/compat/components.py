"""What a pipeline consists of, where its parts are, and what is asked of them as of diffusers' pipelines."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from torch import nn
from tqdm import tqdm

from ldm2 import loading, weights
from ldm2.checkpoints import build, reading
from ldm2.compat import schedulers
from ldm2.compat.parts import ClapPart, Config, Part, ProjectionPart, UNetPart, VAEPart, VocoderPart
from ldm2.runtime.device import choose_device, choose_dtype, dtype_name
from ldm2.runtime.int8_layers import is_int8

NAMES = ("vae", "text_encoder", "text_encoder_2", "projection_model", "language_model", "tokenizer", "tokenizer_2",
         "feature_extractor", "unet", "scheduler", "vocoder")
WEIGHTED: dict[str, type[Part]] = {"unet": UNetPart, "vae": VAEPart, "vocoder": VocoderPart}
BAR = ("disable", "desc", "leave", "ncols", "ascii", "position", "mininterval", "file", "unit", "colour")


class Components:
    """The parts of a checkpoint by diffusers' names, and its scheduler.

    folder:    in the hub's layout; name: what it was called. reference, dtype, device, variant, low_memory: as of
               `ldm2.load`
    """

    def __init__(self, folder: str | PathLike, *, reference: str = "diffusers", dtype: torch.dtype = torch.float32,
                 device: str = "cpu", variant: str | None = None, low_memory: bool = False, name: str | None = None):
        self._folder, self._reference, self._variant = Path(folder), reference, variant
        self._bar: dict[str, Any] = {}
        self._compiles = False
        self._read(device, dtype, low_memory)
        index = {key: tuple(value) if isinstance(value, list) else value
                 for key, value in read(self._folder / "model_index.json").items()}
        self.config = Config(index | {"_name_or_path": str(folder) if name is None else name})
        config = read(self._folder / "scheduler/scheduler_config.json")
        kind = schedulers.CLASSES.get(config.get("_class_name", "DDIMScheduler"))
        if kind is None:
            known = ", ".join(schedulers.CLASSES)
            raise ValueError(f"unknown scheduler {config['_class_name']!r}, choose from {known}")
        self.scheduler = kind.from_config(config)

    def _read(self, device: str, dtype: torch.dtype, low_memory: bool) -> None:
        """The checkpoint's files -> the model; LoRAs stay loaded."""
        before = vars(self).get("_model")
        loras = vars(self).pop("_loras", None) if before is None else before.adapters.recipe()
        self._model = loading.load(
            self._folder, reference=self._reference, device=device, dtype=dtype_name(dtype),
            variant=self._variant, low_memory=low_memory, compile=self._compiles,
        )
        if loras is not None:
            self._model.adapters.follow(loras)
        configs = {name: read(self._folder / name / "config.json") for name in WEIGHTED}
        self._twins: dict[str, nn.Module] = {}             # of transformers, see _of_transformers
        self._parts = {
            name: kind(getattr(self._model, name), configs[name], self._model.stages[name])
            for name, kind in WEIGHTED.items()
        }

    def __repr__(self) -> str:
        return f"AudioLDM2Pipeline({self.name_or_path!r}, {dtype_name(self.dtype)} on {self.device})"

    # Copies

    def __copy__(self) -> Self:
        """Another pipeline on the same weights, with a scheduler of its own to be assigned."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __deepcopy__(self, memo: dict) -> Self:
        """Another pipeline with weights of its own."""
        twin = copy.copy(self)
        vars(twin).pop("_preprocessors", None)
        twin._model, twin._parts, twin._bar = copy.deepcopy((self._model, self._parts, self._bar), memo)
        twin._twins = {}
        return twin

    def __getstate__(self) -> dict:
        """What a process needs to read the same files again, those of LoRAs too; other changes of weights are lost."""
        state = {name: value for name, value in vars(self).items() if name not in ("_model", "_parts", "_twins")}
        state.pop("_preprocessors", None)
        placed = str(self.device), self.dtype, self._model.low_memory
        return state | {"_placed": placed, "_loras": self._model.adapters.recipe()}

    def __setstate__(self, state: dict) -> None:
        device, dtype, low_memory = state.pop("_placed")
        vars(self).update(state)
        self._read(device, dtype, low_memory)

    # What it consists of

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self._model.device

    _execution_device = device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the UNet, the VAE and the vocoder."""
        return self._model.dtype

    @property
    def name_or_path(self) -> str:
        """What `from_pretrained` was called with."""
        return self.config["_name_or_path"]

    @property
    def components(self) -> dict[str, Any]:
        """All parts by their names."""
        return {name: getattr(self, name) for name in NAMES}

    @property
    def vae_scale_factor(self) -> int:
        """Mel frames for each latent frame."""
        return self._model.vae.config.downsampling

    @property
    def scheduler(self) -> Any:
        """How the pipeline samples; assign one of ldm2.compat or of diffusers to change it, for this pipeline alone."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, value: Any) -> None:
        self._sampler, self._schedule = schedulers.read(value)
        self._scheduler = value

    @property
    def unet(self) -> UNetPart:
        """The denoiser. Assigning torch.compile of it has its step compiled as ldm2 does; other UNets give weights."""
        return self._parts["unet"]

    @unet.setter
    def unet(self, value: nn.Module) -> None:
        if self._set("unet", value):
            self.unet.compile()
            self._compiles = True

    @property
    def vae(self) -> VAEPart:
        """The autoencoder. Assigning another of the same structure takes over its weights."""
        return self._parts["vae"]

    @vae.setter
    def vae(self, value: nn.Module) -> None:
        self._set("vae", value)

    @property
    def vocoder(self) -> VocoderPart:
        """The vocoder. Assigning another of the same structure takes over its weights."""
        return self._parts["vocoder"]

    @vocoder.setter
    def vocoder(self, value: nn.Module) -> None:
        self._set("vocoder", value)

    def _set(self, name: str, value: nn.Module) -> bool:
        """Take over a module's weights, unless it is the part itself. Returns whether it came from torch.compile."""
        module = getattr(value, "_orig_mod", value)
        if not isinstance(module, nn.Module):
            kind = type(value).__name__
            raise ValueError(f"{name} must be a module with the structure of this checkpoint's, got {kind}")
        if module is not self._parts[name]:
            with self._awake(name), self._model.adapters.bare():
                self._parts[name].take(module)
        return module is not value

    def _awake(self, name: str) -> AbstractContextManager:
        """The stage of a part whose weights are to be changed. Raises ValueError where files are read each time."""
        if self._model.low_memory:
            raise ValueError(f"{name} is read from files for each stage: assign it before offloading is enabled")
        return self._model.stages[name]

    @property
    def text_encoder(self) -> ClapPart:
        """CLAP, whose text branch is here."""
        return ClapPart(self._model.text.clap, read(self._folder / "text_encoder/config.json"),
                        self._model.stages["text"])

    @property
    def text_encoder_2(self) -> nn.Module:
        """transformers' encoder of T5, or that of VITS in the speech models."""
        text = self._model.text
        if text.is_speech_model:
            return text.phonemes.text_encoder
        return self._of_transformers("text_encoder_2", text.t5.model, transformers.T5EncoderModel)

    @property
    def projection_model(self) -> ProjectionPart:
        """The projection of both encoders to the width of GPT-2."""
        return ProjectionPart(self._model.text.projection, read(self._folder / "projection_model/config.json"),
                              self._model.stages["text"])

    @property
    def language_model(self) -> transformers.GPT2Model:
        """transformers' GPT-2, without a head. Assign a GPT2Model or GPT2LMHeadModel to take another one."""
        no_tokens = {"bos_token_id": None, "eos_token_id": None}                 # unused, and a warning in small tables
        return self._of_transformers("language_model", self._model.text.gpt2, transformers.GPT2Model, **no_tokens)

    @language_model.setter
    def language_model(self, value: nn.Module) -> None:
        gpt2 = getattr(value, "transformer", value)
        own = self.language_model.config
        sizes = ("n_embd", "n_layer", "n_head", "n_positions")
        if not isinstance(gpt2, transformers.GPT2Model) or any(
            getattr(gpt2.config, size) != getattr(own, size) for size in sizes
        ):
            kind = type(value).__name__
            raise ValueError(f"language_model must be a GPT-2 of the sizes of this checkpoint's, got {kind}")
        with self._awake("text"), self._model.adapters.bare():
            self._twins["language_model"] = gpt2.to(self.device, self.dtype).eval()
            _share(gpt2, self._model.text.gpt2)

    def _of_transformers(self, name: str, own: nn.Module, kind: type[nn.Module], **changes: Any) -> Any:
        """transformers' module of a part, with the parameters that the part has now; ldm2's own where they are int8."""
        if is_int8(own):
            return own
        if name not in self._twins:
            fields: Any = {**read(self._folder / name / "config.json"), **changes}
            with weights.on_meta():
                self._twins[name] = kind(kind.config_class.from_dict(fields)).eval()
        _share(own, self._twins[name])
        return self._twins[name]

    @cached_property
    def _preprocessors(self) -> dict[str, Any]:
        """transformers' tokenizers and feature extractor of the checkpoint's folders."""
        second = transformers.VitsTokenizer if self._model.text.is_speech_model else transformers.T5Tokenizer
        kinds = {"tokenizer": transformers.RobertaTokenizer, "tokenizer_2": second,
                 "feature_extractor": transformers.ClapFeatureExtractor}
        return {name: kind.from_pretrained(self._folder / name, local_files_only=True) for name, kind in kinds.items()}

    @property
    def tokenizer(self) -> transformers.RobertaTokenizer:
        """CLAP's tokenizer."""
        return self._preprocessors["tokenizer"]

    @property
    def tokenizer_2(self) -> Any:
        """The tokenizer of T5, or of the phonemes."""
        return self._preprocessors["tokenizer_2"]

    @property
    def feature_extractor(self) -> transformers.ClapFeatureExtractor:
        """CLAP's front end for sounds."""
        return self._preprocessors["feature_extractor"]

    def __setattr__(self, name: str, value: object) -> None:
        fixed = ("text_encoder", "text_encoder_2", "projection_model", "tokenizer", "tokenizer_2", "feature_extractor")
        if name in fixed:
            raise ValueError(f"{name} cannot be replaced: save it into the folder of the checkpoint and load that")
        super().__setattr__(name, value)

    # Where it runs

    def to(
        self, *targets: str | torch.device | torch.dtype | None, device: str | torch.device | None = None,
        dtype: torch.dtype | None = None, torch_device: str | torch.device | None = None,
        torch_dtype: torch.dtype | None = None, silence_dtype_warnings: bool = False,
    ) -> Self:
        """Move to a device, to a dtype, or both, with the weights as they are now. Returns self.

        The text encoders are read again for another dtype: which of their matrices stay float32 depends on it. A
        pipeline that is offloaded stays so, and reads its files for the new place.
        """
        device = torch_device if device is None else device
        dtype = torch_dtype if dtype is None else dtype
        for target in targets:
            device, dtype = (device, target) if isinstance(target, torch.dtype) else (target, dtype)
        model = self._model
        device = model.device if device is None else choose_device(str(device))
        dtype = model.dtype if dtype is None else choose_dtype(dtype_name(dtype), device)
        if (device, dtype) == (model.device, model.dtype):
            return self
        if model.low_memory:
            self._read(str(device), dtype, low_memory=True)
        elif dtype != model.dtype:
            checkpoint = reading.read(self._folder, variant=self._variant)
            text = build.text_encoder(checkpoint, self._reference, device=device, dtype=dtype)
            model.move(device, dtype, text)
        else:
            model.move(device, dtype, model.text.to(device))
        return self

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: str | torch.device | None = None) -> None:
        """Hold only the part that is at work in memory (low_memory), on CUDA where there is one. Reads the files again:
        what was changed in the weights is lost."""
        if device is None:
            device = "cpu" if not torch.cuda.is_available() else "cuda" if gpu_id is None else f"cuda:{gpu_id}"
        self._read(str(choose_device(str(device))), self.dtype, low_memory=True)

    enable_sequential_cpu_offload = enable_model_cpu_offload

    def enable_group_offload(self, onload_device: str | torch.device | None = None, **_: object) -> None:
        """As `enable_model_cpu_offload`, on `onload_device`."""
        self.enable_model_cpu_offload(device=onload_device)

    def remove_all_hooks(self) -> None:
        """End the offloading: hold all parts in memory again."""
        if self._model.low_memory:
            self._read(str(self.device), self.dtype, low_memory=False)

    reset_device_map = remove_all_hooks

    def maybe_free_model_hooks(self) -> None:
        """Accepted: a part that is offloaded goes when its stage ends."""

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Accepted without effect: attention does not hold its matrix, and rows are decoded one by one."""

    def _accepted(self, *_: object, **__: object) -> None:
        """Accepted without effect: attention does not hold its matrix, and rows are decoded one by one."""

    disable_attention_slicing = set_attention_slice = _accepted
    enable_vae_slicing = disable_vae_slicing = enable_vae_tiling = disable_vae_tiling = _accepted
    enable_xformers_memory_efficient_attention = disable_xformers_memory_efficient_attention = _accepted
    set_use_memory_efficient_attention_xformers = fuse_qkv_projections = unfuse_qkv_projections = _accepted

    def set_progress_bar_config(self, **settings: object) -> None:
        """Settings of tqdm's bar, of which `disable` counts."""
        unknown = sorted(set(settings) - set(BAR))
        if unknown:
            raise ValueError(f"the progress bar knows {', '.join(BAR)}, got {', '.join(unknown)}")
        self._bar = settings

    def progress_bar(self, iterable: Iterable | None = None, total: int | None = None) -> tqdm:
        """A bar over an iterable, or of a number of steps."""
        if iterable is None and total is None:
            raise ValueError("progress_bar needs an iterable or a total")
        return tqdm(iterable, total=total, **self._bar)


def read(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint."""
    return json.loads(path.read_text(encoding="utf-8"))


def _share(module: nn.Module, other: nn.Module) -> None:
    """Give `other` the parameters of `module`, which has the same structure."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        weights.assign(other, name, parameter)
