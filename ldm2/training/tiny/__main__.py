"""`python -m ldm2.training.tiny`."""

import sys

from ldm2.training.tiny.train import main

if __name__ == "__main__":
    sys.exit(main())
