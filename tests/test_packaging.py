"""What `pip install` puts on a user's machine, read from the built wheel."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS = [ROOT / folder for folder in SETUPTOOLS["package-dir"].values()]
NOT_INSTALLED = [ROOT / "benchmarks" / "experiments", ROOT / "benchmarks" / "results"]  # the project's own
DATA_SUFFIXES = [pattern.removeprefix("*") for pattern in SETUPTOOLS["package-data"]["*"]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the sources, so that files left in build/ from earlier cannot slip in."""
    copy = tmp_path_factory.mktemp("wheel") / "sources"
    copy.mkdir()
    for name in {folder.relative_to(ROOT).parts[0] for folder in FOLDERS}:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    # Without isolation the build downloads nothing.
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(copy / "dist"),
        str(copy),
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_stays_in_its_namespace(wheel: zipfile.ZipFile) -> None:
    """Nothing lands outside edgeprune/ and the distribution's own metadata folder."""
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"edgeprune", f"edgeprune-{PROJECT['project']['version']}.dist-info"}


def test_namespace_has_no_init(wheel: zipfile.ZipFile) -> None:
    """edgeprune is a namespace package: an __init__.py there would hide the editable install's folders."""
    assert "edgeprune/__init__.py" not in wheel.namelist()


def test_wheel_holds_every_source_and_data_file(wheel: zipfile.ZipFile) -> None:
    """Every module and data file is in the wheel: an editable install would not notice one missing."""
    expected = {
        f"edgeprune/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in folder.rglob("*")
        if path.suffix in (".py", *DATA_SUFFIXES) and "__pycache__" not in path.parts
        if not any(folder in path.parents for folder in NOT_INSTALLED)
    }
    assert expected == {name for name in wheel.namelist() if name.startswith("edgeprune/")}


def test_every_package_folder_is_listed() -> None:
    """Each folder with an __init__.py is in pyproject.toml's list, under its own name."""
    skipped = {"tests", "build", "runs", "dist"}
    found = {
        path.parent.relative_to(ROOT)
        for top in ROOT.iterdir()
        if top.is_dir() and not top.name.startswith(".") and top.name not in skipped
        for path in top.rglob("__init__.py")
    }
    assert {f"edgeprune.{'.'.join(folder.parts)}" for folder in found} == set(SETUPTOOLS["packages"])
    assert SETUPTOOLS["package-dir"] == {
        f"edgeprune.{'.'.join(folder.parts)}": folder.as_posix() for folder in found
    }


def test_metadata_names_licence_and_command(wheel: zipfile.ZipFile) -> None:
    """The wheel carries licence, notice, the Python floor and the console script."""
    info = f"edgeprune-{PROJECT['project']['version']}.dist-info"
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert re.search(r"^License-Expression: Apache-2\.0$", metadata, re.MULTILINE)
    assert re.search(r"^Requires-Python: >=3\.10$", metadata, re.MULTILINE)
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= set(wheel.namelist())
    assert "edgeprune = edgeprune.cli:app" in wheel.read(f"{info}/entry_points.txt").decode()


def test_type_links_reach_the_folders() -> None:
    """The links that mypy follows point at this checkout's folders, by relative paths."""
    links = ROOT / "build" / "types" / "edgeprune"
    if not links.is_dir():
        pytest.skip("no build/types: made by `make install`")
    for link in links.iterdir():
        assert not link.readlink().is_absolute()
        assert link.resolve() == ROOT / link.name
