"""`python -m mllm`: what launchers start, and what works where no script is on PATH."""

import sys

from mllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
