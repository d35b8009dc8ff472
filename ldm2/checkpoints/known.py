"""The known checkpoints: names, where they are, what they are for, licences. Facts and sources: weights.md.

Importing this module imports neither torch nor a hub client.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

DEFAULT_MODEL = "cvssp/audioldm2"


@dataclass(frozen=True)
class Model:
    """One known checkpoint.

    name, aliases: short names; repo: where it is on the hub (None: inside this package)
    layout:        "hub" (a folder for each part), "original" (one .pth file of the authors) or "bundled"
    file:          name of the .pth file in the repository; None for folders
    revision:      commit to take unless told otherwise; None where only its abbreviation is known to us
    parameters:    of the parts that are used, text encoders included; download: bytes; None where not known
    license:       the tag of the repository
    same_as:       name of the checkpoint with the same weights in another layout
    """

    name: str
    task: str
    license: str
    repo: str | None = None
    layout: str = "hub"
    file: str | None = None
    revision: str | None = None
    sample_rate: int = 16_000                              # Hz
    parameters: int | None = None
    download: int | None = None                            # bytes
    aliases: tuple[str, ...] = ()
    same_as: str | None = None


MODELS = (
    Model(
        "tiny", "formula sounds", "Apache-2.0", layout="bundled", parameters=5_400_000,
    ),
    Model(
        "audioldm2", "sound", "CC-BY-NC-SA-4.0", "cvssp/audioldm2",
        revision="c8e7e189d324425c05c4c2f81214041ef4107983",
        parameters=1_118_000_000, download=4_474_000_000, same_as="audioldm2-full",
    ),
    Model(
        "audioldm2-large", "sound", "CC-BY-NC-SA-4.0", "cvssp/audioldm2-large",
        revision="4b0b875a9e0c5305dfc917da808584e50e1c7ed4",
        parameters=1_489_000_000, download=5_959_000_000, same_as="audioldm2-full-large-1150k",
    ),
    Model(
        "audioldm2-music", "music", "CC-BY-NC-SA-4.0", "cvssp/audioldm2-music",
        revision="0019cb0bd4d314accff72aee1c3abd6f22929ba5",
        parameters=1_118_000_000, download=4_474_000_000, same_as="audioldm2-music-665k",
    ),
    Model(
        "audioldm2-gigaspeech", "speech", "CreativeML-OpenRAIL-M", "anhnct/audioldm2_gigaspeech",
        parameters=698_000_000, download=2_912_000_000, same_as="audioldm2-speech-gigaspeech",
    ),
    Model(
        "audioldm2-ljspeech", "speech", "CreativeML-OpenRAIL-M", "anhnct/audioldm2_ljspeech",
        revision="32ab10ffc92907e6a6741319675a1175fd925a66",
        parameters=698_000_000, download=2_912_000_000, same_as="audioldm2-speech-ljspeech",
    ),
    Model(
        "audioldm2-full", "sound", "CC-BY-NC-ND-4.0", "haoheliu/audioldm2-full", "original", "audioldm2-full.pth",
        revision="2ca60060e434b612f85db7394ea901c0edb2a30a",
        parameters=1_118_000_000, download=8_500_690_979, same_as="audioldm2",
    ),
    Model(
        "audioldm2-full-large-1150k", "sound", "CC-BY-NC-ND-4.0", "haoheliu/audioldm2-full-large-1150k", "original",
        "audioldm2-full-large-1150k.pth", revision="327bb3e09b48caeed6c283cfe16cdb2323dfb374",
        parameters=1_489_000_000, download=11_470_645_003, same_as="audioldm2-large",
    ),
    Model(
        "audioldm2-music-665k", "music", "CC-BY-NC-ND-4.0", "haoheliu/audioldm2-music-665k", "original",
        "audioldm2-music-665k.pth", revision="dc4c0191c097c725f77080d426649b9b3941a3d2",
        parameters=1_118_000_000, download=8_500_000_000, same_as="audioldm2-music",
    ),
    Model(
        "audioldm2-speech-gigaspeech", "speech", "OpenRAIL", "haoheliu/audioldm2-speech", "original",
        "audioldm2-speech-gigaspeech.pth", revision="a670ce56b96b575c826315df45b79d9e42ce2cdd",
        parameters=698_000_000, download=5_110_000_000, same_as="audioldm2-gigaspeech",
    ),
    Model(
        "audioldm2-speech-ljspeech", "speech", "OpenRAIL", "haoheliu/audioldm2-speech", "original",
        "audioldm2-speech-ljspeech.pth", revision="a670ce56b96b575c826315df45b79d9e42ce2cdd",
        parameters=698_000_000, download=5_110_000_000, same_as="audioldm2-ljspeech",
    ),
    Model(
        "audioldm-48k", "sound", "CC-BY-NC-4.0", "haoheliu/audioldm_48k", "original", "audioldm_48k.pth",
        revision="136532dc32868860ed2815df1035acdc832310e1", sample_rate=48_000,
        parameters=870_000_000, download=5_359_712_103, aliases=("audioldm_48k",),
    ),
    Model(
        "audioldm-16k-crossattn-t5", "sound", "CC-BY-NC-4.0", "haoheliu/audioldm_16k_crossattn_t5", "original",
        "audioldm_16k_crossattn_t5.pth",
        parameters=911_000_000, download=4_730_000_000, aliases=("audioldm_16k_crossattn_t5",),
    ),
    Model(
        "audioldm-s-full-v2", "sound", "CC-BY-NC-SA-4.0", "cvssp/audioldm-s-full-v2",
        revision="bef13a486a2a536162324de2d506c0c2d3db2ff0", parameters=421_000_000, download=1_684_000_000,
    ),
    Model(
        "audioldm-m-full", "sound", "CC-BY-NC-SA-4.0", "cvssp/audioldm-m-full",
        revision="af776f973dbb56a13f3713267131fc6dd972b405", parameters=652_000_000, download=2_608_000_000,
    ),
    Model(
        "audioldm-l-full", "sound", "CC-BY-NC-SA-4.0", "cvssp/audioldm-l-full",
        parameters=975_000_000, download=3_901_000_000,
    ),
    Model(
        "audioldm", "sound", "CC-BY-NC-SA-4.0", "cvssp/audioldm",
        revision="8ed5f6437581a2fee9c662842d7cb13459914b0f",
    ),
)


def find(name: str) -> Model | None:
    """The checkpoint of this short name, alias or repository; None if it is not in the table.

    Raises ValueError for a repository that holds more than one, naming them.
    """
    for model in MODELS:
        if name == model.name or name in model.aliases:
            return model
    rows = [model for model in MODELS if model.repo == name]
    if len(rows) > 1:
        raise ValueError(f"{name} holds {len(rows)} checkpoints, choose {' or '.join(model.name for model in rows)}")
    return rows[0] if rows else None


def unknown(name: str) -> ValueError:
    """The error for a name that is neither in the table nor a hub name, with the closest known ones first."""
    names = [model.name for model in MODELS]
    close = difflib.get_close_matches(name.lower(), names, n=3)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    return ValueError(
        f"unknown model {name!r}{hint}: give one of {', '.join(names)}, a hub name OWNER/MODEL, or a folder (./{name})"
    )
