"""`python -m flm_torchrec COMMAND …`, the same as `flm`: for launchers that want a module.

A launcher's own options are kept apart by a lone `--`, which is dropped here.
"""

from __future__ import annotations

import sys

from flm_torchrec.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[2:] if sys.argv[1:2] == ["--"] else sys.argv[1:]))
