"""Fine-tune the tiny detector in a process of its own: `fine_tune_tiny.py job.json`, also under torchrun.

Keys of the job: train, select (folders of `write_squares`), result (where the state dict goes), options, and
optionally checkpoint, dropout and kill_at (the step at which the process kills itself).
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from squares_detector import TinyDetector

from edgeprune.data.dataset import load_dataset
from edgeprune.detectors import distributed
from edgeprune.detectors.training import FineTuneOptions, fine_tune

if __name__ == "__main__":
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())

    def kill_in_time(done: int, _: int) -> None:
        if done == job.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)

    network = TinyDetector(dropout=job.get("dropout", 0.0))
    train, select = (
        load_dataset(Path(job[name]) / "images.json", Path(job[name]) / "images")
        for name in ("train", "select")
    )
    checkpoint = Path(job["checkpoint"]) if "checkpoint" in job else None
    options = FineTuneOptions(**job["options"])
    with distributed.processes("cpu"):
        fine_tune(
            network,
            network,
            None,
            train,
            select,
            options,
            seed=3,
            checkpoint=checkpoint,
            progress=kill_in_time,
        )
        if distributed.rank() == 0:
            torch.save(network.state_dict(), job["result"])
