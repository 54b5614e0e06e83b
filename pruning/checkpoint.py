"""A step on disk: `detector.json` (what to rebuild) and `weights.safetensors` (what to load into it).

Loading builds the unpruned detector from its code, narrows it to the channels that the specification keeps, and loads
the weights. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgeprune.data.errors import EdgePruneError
from edgeprune.data.files import atomic_path, read_json, sha256_of, write_json
from edgeprune.detectors.protocol import Detector
from edgeprune.detectors.registry import build_detector
from edgeprune.pruning.counting import count
from edgeprune.pruning.graph import Network, tensors, trace
from edgeprune.pruning.groups import find_groups
from edgeprune.pruning.records import DetectorSpec, PrunedDetector, PruningStep
from edgeprune.pruning.surgery import replay

SCHEMA_VERSION = 1
RECORD, WEIGHTS = "detector.json", "weights.safetensors"


class StepError(EdgePruneError):
    """A saved step is missing, damaged or of another program version."""


def trace_detector(detector: nn.Module, input_size: tuple[int, int]) -> Network:
    """The network of a detector: what is pruned and trained."""
    return trace(detector, torch.zeros(1, 3, *input_size))


def describe(name: str, detector: Detector, network: Network) -> DetectorSpec:
    """The specification of a (narrowed) network of the detector registered as `name`."""
    return DetectorSpec(
        name=name,
        input_size=detector.input_size,
        classes=tuple(detector.classes),
        preprocessing=detector.preprocessing.to_json(),
        channels={layer.layer: layer.channels for layer in count(network).layers},
        kept=dict(network.kept),
        added_biases=network.added_biases,
        frozen=tuple(name for name, value in network.named_parameters() if not value.requires_grad),
        variant=dict(getattr(detector, "variant", {})),
    )


def save_step(folder: Path, pruned: PrunedDetector) -> None:
    """Write a step; `detector.json` comes last and marks the step as whole.

    Raises:
        EdgePruneError: If it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = {name for name, _ in tensors(pruned.network)}
    # What decoding needs beside the network: tensors of the detector that its forward pass does not use.
    own = pruned.detector.state_dict(keep_vars=True)
    in_network = {id(value) for name, value in own.items() if name in names}  # a tied one has other names too
    beside = {f"detector.{name}": value for name, value in own.items() if id(value) not in in_network}
    state = {  # cloned, as safetensors refuses tensors that share memory
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in [*tensors(pruned.network), *beside.items()]
    }
    spec = pruned.spec.to_json()
    with atomic_path(folder / WEIGHTS) as path:
        save_file(state, path, {"spec_sha256": _sha256_of_json(spec)})
    write_json(
        folder / RECORD,
        {
            "schema_version": SCHEMA_VERSION,
            "spec": spec,
            "steps": [step.to_json() for step in pruned.steps],
            "weights_sha256": sha256_of(folder / WEIGHTS),
        },
    )


def load_step(folder: Path) -> PrunedDetector:
    """Read a step that `save_step` wrote; the network is in evaluation mode.

    Raises:
        StepError: If files are missing, damaged or do not belong together.
    """
    try:
        record = read_json(folder / RECORD)
    except EdgePruneError as error:
        raise StepError(str(error)) from error
    try:
        if record["schema_version"] != SCHEMA_VERSION:
            raise StepError(
                f"{folder / RECORD} was written by another edgeprune (schema {record['schema_version']})"
            )
        spec = DetectorSpec.from_json(record["spec"])
        steps = tuple(PruningStep.from_json(step) for step in record["steps"])
        expected = record["weights_sha256"]
    except (KeyError, TypeError, AttributeError) as error:
        raise StepError(f"{folder / RECORD} is damaged ({error!r}); prune again") from error
    state = _read_weights(folder / WEIGHTS, expected, _sha256_of_json(record["spec"]))
    detector = build_detector(spec.name, spec.input_size, spec.classes, spec.variant)
    network = trace_detector(detector, spec.input_size)
    try:
        network = replay(find_groups(network), spec.kept, spec.added_biases)
        own = {name: value for name, value in state.items() if not name.startswith("detector.")}
        network.load_state_dict(own, strict=True)
        beside = {
            name.removeprefix("detector."): v for name, v in state.items() if name.startswith("detector.")
        }
        detector.load_state_dict(beside, strict=False)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise StepError(f"{folder}: weights and specification do not fit {spec.name}: {reason}") from error
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in spec.frozen)
    detector.eval()
    network.eval()
    return PrunedDetector(spec, detector, network, steps)


def _sha256_of_json(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _read_weights(path: Path, sha256: str, spec_sha256: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise StepError(f"{path} is missing; prune again")
    if sha256_of(path) != sha256:
        raise StepError(f"{path} is not the file that {RECORD} describes (sha256 differs); prune again")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        state: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise StepError(f"{path} is damaged ({error}); prune again") from error
    if metadata.get("spec_sha256") != spec_sha256:
        raise StepError(f"{path} belongs to another specification than the one in {RECORD}; prune again")
    return state
