"""Score small networks, alone or under torchrun: `score_in_processes.py RESULT`; writes RESULT-rank.json."""

import json
import sys
from pathlib import Path

import torch
from small import Attending, Chain, Loss, batches, groups_of, pictures, seeded

from edgeprune.detectors import distributed
from edgeprune.pruning.importance import Scoring, score

if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.processes("cpu"):
        rank, world = distributed.rank(), distributed.world_size()
        results = {}
        for make in (Chain, Attending):
            groups = groups_of(seeded(make))
            for images in (5, 1):
                given = batches(pictures(images)[rank::world])
                scoring = Scoring(groups, Loss(), given, replacement="linear")  # type: ignore[arg-type]
                name = f"{make.__name__}, {images} images"
                for criterion in ("taylor", "taylor-sum", "taylor-weight"):
                    results[f"{name}, {criterion}"] = score(criterion, scoring).tolist()
                results[f"{name}, means"] = torch.cat(
                    [each.mean for each in scoring.statistics.values()]
                ).tolist()
        Path(f"{sys.argv[1]}-{rank}.json").write_text(json.dumps(results))
    assert not [name for name in Path("/proc/self/task").glob("*/comm") if "gloo" in name.read_text()]
