"""`python -m ldm2.build_kernels` compiles the CPU kernels: see `ldm2_kernels.build`."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1] / "kernels"))              # in a clone that is not installed
    from ldm2_kernels.build import main

    sys.exit(main())
