"""``python3 -m edgeprune_device COMMAND job.json result.json``: see `agent.py`."""

import sys

from .agent import main

sys.exit(main(sys.argv[1:]))
