"""What type checkers and editors see of the package, whose names are imported when they are first used."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:                          # so that mypy takes up the modules before this one, which they import
    from ldm2.loading import generate as generate
    from ldm2.loading import load as load
    from ldm2.pipeline import AudioLDM2 as AudioLDM2
    from ldm2.result import Result as Result
    from ldm2.samplers import Cancelled as Cancelled
    from ldm2.settings import Settings as Settings

__version__: str
