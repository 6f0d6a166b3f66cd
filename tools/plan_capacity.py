"""Plan tables over a cluster that need not be there: `flm plan` under another name, with the same options.

python tools/plan_capacity.py --spec configs/plans/ten_billion.yaml --hardware h100 --nodes 2
"""

from __future__ import annotations

import sys

from flm_torchrec.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
