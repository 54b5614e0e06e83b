"""The narrowed network imitates the unpruned one inside, not only at its outputs.

Every channel that survives has a twin in the unpruned network. While fine-tuning, what each layer reads is
compared with what the same layer reads there: many more targets an image than boxes or even dense outputs
give, so few images serve (compare FitNets, Romero et al. 2015, arXiv:1412.6550, which has to learn the
correspondence that is known here).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from edgeprune.pruning.graph import Network
from edgeprune.pruning.groups import Groups
from edgeprune.pruning.surgery import channel_ids


class Imitation:
    """Compares what the layers of a narrowed network read with the unpruned network's.

    Args:
        groups: of the unpruned network.
        student: narrowed from it.
    """

    def __init__(self, groups: Groups, student: Network) -> None:
        gone = np.zeros(groups.units + 1, dtype=bool)
        for producer in groups.producers:
            ids = groups.channels(producer.layer)
            kept = student.kept.get(producer.layer)
            if kept is not None:
                gone[np.delete(ids, list(kept))] = True
        gone[0] = False
        left = {node.name for node in student.graph.nodes}
        self.survivors: dict[
            str, tuple[int, Tensor]
        ] = {}  # node name -> its channel axis, which channels survive
        for reader in groups.readers:
            if reader.weight is not None and reader.tensor.name in left:
                stays = ~gone[channel_ids(groups, reader)]
                self.survivors[reader.tensor.name] = (reader.dim, torch.from_numpy(np.flatnonzero(stays)))

    def __call__(self, student: nn.Module, teacher: nn.Module, images: Tensor) -> tuple[Any, Any, Tensor]:
        """Run both.

        Returns:
            The raw outputs of both, and for each image ``(N,)`` the mean squared difference of what layers read, as a
            share of the teacher's variance, mean over layers.
        """
        with torch.no_grad():
            taught = _Observed(teacher, set(self.survivors))
            teacher_raw = taught.run(images)
        learnt = _Observed(student, set(self.survivors))
        raw = learnt.run(images)
        shares = []
        for name, (dim, index) in self.survivors.items():
            target = taught.seen[name].index_select(dim, index.to(images.device)).float()
            if len(target) != len(images):
                continue  # the batch is not its first axis
            difference = (learnt.seen[name].float() - target).flatten(1).square().mean(1)
            shares.append(difference / target.flatten(1).var(1).clamp_min(1e-6))
        return raw, teacher_raw, torch.stack(shares).mean(0) if shares else images.new_zeros(len(images))


class _Observed(fx.Interpreter):
    """Runs a network and keeps the results of some of its nodes."""

    def __init__(self, network: nn.Module, names: set[str]) -> None:
        assert isinstance(network, Network)
        super().__init__(network)
        self.names = names
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.names:
            self.seen[n.name] = result
        return result
