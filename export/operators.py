"""What each TensorRT version's ONNX parser accepts: the published operator tables, in operators.tsv.

A row of the file is one entry of one version with its source; `verified` is "no" where the source could not
be read for that very version. Beside operators (value Y or N, element types, restrictions as published) a
version has the entries `opset` and `opset from` (highest and lowest), `ir_version` (highest), `uint8 input`.
"""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edgeprune.export.errors import ExportError

LIMITS = ("opset", "opset from", "ir_version", "uint8 input")


@dataclass(frozen=True)
class Entry:
    """What one TensorRT version says about one operator, or one of its limits."""

    value: str
    types: frozenset[str]
    """TensorRT's names: FP32, FP16, BF16, INT32, INT64, INT8, UINT8, BOOL ..."""
    restrictions: str
    source: str
    verified: bool


@dataclass(frozen=True)
class OperatorTable:
    """All entries of one TensorRT version."""

    tensorrt: str
    entries: dict[str, Entry]

    @property
    def max_opset(self) -> int:
        return int(self.entries["opset"].value)

    @property
    def min_opset(self) -> int:
        return int(self.entries["opset from"].value) if "opset from" in self.entries else 7

    @property
    def max_ir_version(self) -> int:
        return int(self.entries["ir_version"].value)

    @property
    def uint8_input(self) -> bool:
        return self.entries["uint8 input"].value == "Y"

    @property
    def verified(self) -> bool:
        """Whether the operators' rows were read from this version's own table."""
        return all(entry.verified for name, entry in self.entries.items() if name not in LIMITS)


@cache
def tables() -> dict[tuple[int, int], OperatorTable]:
    """The table of each version, by (major, minor), ascending."""
    entries: dict[str, dict[str, Entry]] = {}
    with Path(__file__).with_name("operators.tsv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            types = frozenset(name.strip() for name in row["types"].split(",") if name.strip())
            entries.setdefault(row["tensorrt"], {})[row["entry"]] = Entry(
                row["value"], types, row["restrictions"], row["source"], row["verified"] == "yes"
            )
    return dict(
        sorted((_parse(version), OperatorTable(version, table)) for version, table in entries.items())
    )


def table_for(tensorrt: str) -> OperatorTable:
    """The newest table that is not newer than a TensorRT version such as "8.2.1".

    Raises:
        ExportError: If the version is malformed or older than every table.
    """
    wanted = _parse(tensorrt)
    older = [table for version, table in tables().items() if version <= wanted]
    if not older:
        raise ExportError(
            f"TensorRT {tensorrt} is older than {next(iter(tables().values())).tensorrt}, the first known"
        )
    return older[-1]


def _parse(version: str) -> tuple[int, int]:
    try:
        major, minor = version.split(".")[:2]
        return int(major), int(minor)
    except ValueError:
        raise ExportError(f"{version!r} is no TensorRT version: give one such as 8.2 or 10.3") from None
