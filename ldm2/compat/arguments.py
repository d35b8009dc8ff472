"""The arguments of `from_pretrained`: which count, which have no effect, which are refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

logger = logging.getLogger(__name__)

# Accepted without effect: ldm2 maps weights into memory, reads no code, and takes safetensors before pickles anyway.
NO_EFFECT = {
    "use_safetensors", "low_cpu_mem_usage", "trust_remote_code", "offload_folder", "offload_state_dict", "max_memory",
    "disable_mmap", "use_flashpack", "use_onnx", "resume_download", "mirror", "load_connected_pipeline",
    "safety_checker", "requires_safety_checker",
}
# Refused unless None or False, with what to do instead.
REFUSED = {
    "custom_pipeline": "code of others is not run",
    "custom_revision": "code of others is not run",
    "quantization_config": "take torch_dtype=torch.bfloat16",
    "force_download": "drop the checkpoint from the cache, for example with `hf cache rm`, and load it again",
    "proxies": "set HTTPS_PROXY",
    "provider": "there is no ONNX here",
    "sess_options": "there is no ONNX here",
    "provider_options": "there is no ONNX here",
    "output_loading_info": "loading is strict: a key too many or too few raises",
    "use_auth_token": "it is called token now",
    "subfolder": "give the folder itself",
}


def check(options: Mapping[str, object]) -> None:
    """Raise ValueError for what is refused; warn of what nobody knows, as diffusers does."""
    for name, value in options.items():
        if name in REFUSED and value not in (None, False):
            raise ValueError(f"{name} is not supported ({REFUSED[name]}), got {value!r}")
    unknown = sorted(set(options) - NO_EFFECT - set(REFUSED))
    if unknown:
        logger.warning("from_pretrained does not know %s: without effect", ", ".join(unknown))


def dtype_of(*given: object) -> torch.dtype:
    """The one dtype of torch_dtype and dtype, float32 without any. Raises ValueError for what is none."""
    stated = [value for value in given if value not in (None, "auto")]
    if not stated:
        return torch.float32
    value = stated[-1]
    if isinstance(value, Mapping):
        kinds = set(value.values())
        if len(kinds) != 1:
            raise ValueError(f"torch_dtype must be one dtype for all parts, got {value!r}")
        [value] = kinds
    value = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(value, torch.dtype):
        raise ValueError(f"torch_dtype must be a torch.dtype, got {stated[-1]!r}")
    if not value.is_floating_point:
        raise ValueError(f"torch_dtype must be a floating dtype, got {value}: int8 weights are for ldm2.load")
    return value


def device_of(device_map: object) -> str:
    """The one device of a device_map; "cpu" without any, and the best there is for "auto" and "balanced"."""
    if device_map is None:
        return "cpu"
    if isinstance(device_map, Mapping):
        places = {str(place) for place in device_map.values()}
        if len(places) != 1:
            raise ValueError(f"device_map must name one device for all parts, got {device_map!r}")
        [device_map] = places
    name = str(device_map)
    return "auto" if name in ("auto", "balanced", "balanced_low_0", "sequential") else name
