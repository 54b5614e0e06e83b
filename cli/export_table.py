"""Write docs/export.md: which of the project's exports every target's TensorRT reads, by its operator table.

python -m edgeprune.cli.export_table docs/export.md
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from torch import nn

from edgeprune.data.files import write_bytes
from edgeprune.deploy.targets import Target, known_targets
from edgeprune.detectors.protocol import Detector
from edgeprune.detectors.registry import DETECTORS, build_detector
from edgeprune.export.check import check_model
from edgeprune.export.model import Batch, ExportedModel, export_onnx
from edgeprune.export.operators import table_for
from edgeprune.pruning.graph import trace
from edgeprune.pruning.groups import find_groups
from edgeprune.pruning.surgery import remove

REMOVED = 0.4  # of each group's channels, in the pruned column
INPUT_SIZE = (320, 320)
KINDS: dict[str, dict[str, Any]] = {
    "batch 1": {},
    "batch 1:4:8": {"batch": Batch(1, 4, 8)},
    "uint8 input": {"input": "uint8"},
    "float16 types": {"precision": "fp16"},
}
HEAD = """# Exports by target

Written by `python -m edgeprune.cli.export_table docs/export.md`; a test holds it to the code.

`yes`: every node is in the operator table of the target's TensorRT, within its restrictions (what
`edgeprune check` says). That is the parser's documentation, not a run on a board. "Pruned" has 40 % of the
channels of every group removed. Up to TensorRT 10 the builder makes fp16 of the fp32 file; float16 types are
for version 11. `uint8 input` is an option, for TensorRT 8.6 and later. int8 files are made from training
images and checked when they are exported.

The newest table that is not newer than the target's TensorRT decides: {tables}.
"""


def table() -> str:
    """The document."""
    versions = dict.fromkeys(str(target.tensorrt) for target in _targets())
    used = {version: table_for(version) for version in versions}
    tables = "; ".join(
        f"for {version} that of {found.tensorrt}{'' if found.verified else ' (not verified)'}"
        for version, found in used.items()
    )
    return HEAD.format(tables=tables) + "".join(section(name) for name in sorted(DETECTORS))


def section(name: str) -> str:
    """What the document says of one detector."""
    with tempfile.TemporaryDirectory() as folder:
        rows = list(_rows(name, Path(folder)))
    return "\n".join(["", f"## {name}, {INPUT_SIZE[0]}x{INPUT_SIZE[1]}", "", *rows, ""])


def _targets() -> Iterator[Target]:
    yield from (target for target in known_targets().values() if target.tensorrt)


def _networks(name: str) -> Iterator[tuple[str, Detector, nn.Module]]:
    torch.manual_seed(0)
    module = build_detector(name, INPUT_SIZE).eval()
    network = trace(module, torch.zeros(1, 3, *INPUT_SIZE))
    groups = find_groups(network)
    units = [unit for group in groups.groups for unit in group.units[: int(REMOVED * len(group.units))]]
    detector = cast(Detector, module)
    yield "unpruned", detector, network
    yield "pruned", detector, remove(groups, units)


def _rows(name: str, folder: Path) -> Iterator[str]:
    files: dict[tuple[str, str, int], ExportedModel] = {}
    opsets = sorted({target.max_opset for target in _targets()})
    for network_name, detector, network in _networks(name):
        for kind, options in KINDS.items():
            for opset in opsets:
                path = folder / f"{name}-{network_name}-{kind.replace(':', '-')}-{opset}.onnx"
                key = network_name, kind, opset
                files[key] = export_onnx(detector, network, path, opset=opset, metadata={}, **options)
        plain = files[network_name, "batch 1", opsets[0]]
        operators = Counter(node.op_type for node in onnx.load(plain.path).graph.node)
        counts = ", ".join(f"{count} {operator}" for operator, count in operators.most_common())
        yield (
            f"{network_name.capitalize()}: {plain.size_bytes / 1e6:.1f} MB, {plain.nodes} nodes "
            f"({plain.nodes_traced} as traced): {counts}."
        )
        yield ""
    columns = [f"{kind}, {network}" for kind in KINDS for network in ("unpruned", "pruned")]
    yield f"| target | TensorRT | opset | {' | '.join(columns)} |"
    yield f"|{' --- |' * (3 + len(columns))}"
    answers: dict[tuple[Path, str], str] = {}
    for target in _targets():
        tensorrt = str(target.tensorrt)
        cells = []
        for kind in KINDS:
            for network_name in ("unpruned", "pruned"):
                path = files[network_name, kind, target.max_opset].path
                if (path, tensorrt) not in answers:
                    report = check_model(path, tensorrt)
                    first = next((v.reason for v in report.violations), None)
                    answers[path, tensorrt] = "yes" if first is None else f"no: {first}"
                cells.append(answers[path, tensorrt])
        yield f"| {target.name} | {target.tensorrt} | {target.max_opset} | {' | '.join(cells)} |"


if __name__ == "__main__":
    write_bytes(Path(sys.argv[1]), table().encode())
