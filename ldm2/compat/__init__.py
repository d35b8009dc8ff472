"""A drop-in for `diffusers.AudioLDM2Pipeline`: the same arguments, the same `.audios`.

    from ldm2.compat import AudioLDM2Pipeline          # was: from diffusers import AudioLDM2Pipeline

The same generator gives the same audio as diffusers; `reference` is "diffusers" unless it is said otherwise. As there,
candidates (num_waveforms_per_prompt > 1) come back in the order they were made unless librosa is installed; where it
is, they are ranked, but each prompt's apart from the others'. docs/diffusers.md lists what works how.
"""

from ldm2.compat.parts import AudioPipelineOutput
from ldm2.compat.pipeline import AudioLDM2Pipeline
from ldm2.compat.schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

__all__ = [
    "AudioLDM2Pipeline",
    "AudioPipelineOutput",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
]
