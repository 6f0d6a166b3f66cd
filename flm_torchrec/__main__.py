"""`python -m flm_torchrec COMMAND …` is the same as `flm`, for launchers that start a module.

A `--` that separates the options of a launcher is dropped here.
"""

from __future__ import annotations

import sys

from flm_torchrec.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[2:] if sys.argv[1:2] == ["--"] else sys.argv[1:]))
