"""The agent that runs on the device: Python 3.6 to 3.13, standard library, numpy and a runtime.

It imports nothing else of edgeprune. On a device it is the package `edgeprune_device`:
``python3 -m edgeprune_device COMMAND job.json result.json``. Read `agent.py` first.
"""
