"""ComfyUI nodes of ldm2: this folder goes into ComfyUI/custom_nodes, and `pip install ldm2` into ComfyUI's Python."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
