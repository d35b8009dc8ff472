"""`python -m ldm2` and the console command `ldm2`."""

from __future__ import annotations

import sys

from ldm2.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
