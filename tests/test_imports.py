"""Imports point one way: ARCHITECTURE.md states the order, these tests hold the code to it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "deploy.device"


def stated_order() -> list[str]:
    """The folders in ARCHITECTURE.md's line `cli -> ... -> deploy/device`, importers first."""
    (line,) = re.findall(r"^\s+(cli(?: -> [\w/]+)+)$", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    return [name.replace("/", ".") for name in line.split(" -> ")]


def folder_of(module: str) -> str:
    """'edgeprune.deploy.device.imaging' -> 'deploy.device'; 'edgeprune.data.files' -> 'data'."""
    parts = module.split(".")[1:]
    return DEVICE if parts[:2] == DEVICE.split(".") else parts[0]


def imported_modules(path: Path) -> Iterator[str]:
    """Full names of everything that `path` imports, also inside functions and under TYPE_CHECKING."""
    package = ["edgeprune", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            yield from (".".join([*module, alias.name]) for alias in node.names)


def sources(folder: str) -> list[Path]:
    return [
        path
        for path in sorted((ROOT / folder.replace(".", "/")).rglob("*.py"))
        if (DEVICE.replace(".", "/") in path.as_posix()) == (folder == DEVICE)
    ]


@pytest.mark.parametrize("folder", stated_order())
def test_imports_point_one_way(folder: str) -> None:
    """No module imports from a folder that stands before its own in ARCHITECTURE.md's order."""
    order = stated_order()
    assert sources(folder), f"{folder}/ holds no module"
    for path in sources(folder):
        for module in imported_modules(path):
            if module.startswith("edgeprune."):
                assert order.index(folder_of(module)) >= order.index(folder), f"{path} imports {module}"


def test_the_agent_imports_nothing_of_ours() -> None:
    """deploy/device runs on a board that has no edgeprune: it imports its own files only."""
    for path in sources(DEVICE):
        outside = [
            module
            for module in imported_modules(path)
            if module.startswith("edgeprune.") and folder_of(module) != DEVICE
        ]
        assert not outside, f"{path} imports {outside}"


def test_only_cli_prints() -> None:
    """Libraries return or raise: no print() outside cli/ and the experiments, which are programs."""
    for folder in stated_order():
        if folder == "cli":
            continue
        for path in sources(folder):
            if "experiments" in path.parts:
                continue
            printed = [
                node.lineno
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            ]
            assert not printed, f"{path} prints in lines {printed}"


def test_every_folder_of_the_package_is_in_the_order() -> None:
    """A folder that nobody placed in ARCHITECTURE.md cannot hide from the test above."""
    found = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert found == {name.split(".")[0] for name in stated_order()}
