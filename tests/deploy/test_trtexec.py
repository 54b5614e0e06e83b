"""trtexec: the flags of each version, and what it writes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeprune.deploy.device.trtexec import build_flags, read_times, time_flags
from edgeprune.deploy.errors import DeviceError
from edgeprune.deploy.session import Session
from edgeprune.deploy.targets import load_target
from edgeprune.deploy.transport import Local

HERE = Path(__file__).parent

# NVIDIA's release notes and trtexec --help of each version, as recorded in the facts.
KNOWN = {
    "8.2.1": {"--workspace", "--buildOnly", "--fp16", "--int8"},
    "8.4.1": {"--memPoolSize", "--workspace", "--buildOnly", "--fp16", "--int8"},
    "8.6.1": {"--memPoolSize", "--skipInference", "--builderOptimizationLevel", "--fp16", "--int8"},
    "10.3.0": {"--memPoolSize", "--skipInference", "--builderOptimizationLevel", "--fp16", "--int8"},
    "11.4.0": {"--memPoolSize", "--skipInference", "--builderOptimizationLevel"},
}
ALL = {"--useDLACore", "--allowGPUFallback"}


@pytest.mark.parametrize("version", KNOWN)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_only_flags_that_the_version_has(version: str, precision: str) -> None:
    """No flag of another version is used, whatever is asked for; reduced precision has its flag before 11."""
    flags = build_flags(version, precision, {"optimization_level": 2, "dla_core": 0}, 256)
    names = {flag.split("=")[0] for flag in flags}
    assert names <= KNOWN[version] | ALL
    assert ("--fp16" in names) == (precision != "fp32" and not version.startswith("11"))
    assert ("--workspace=256" in flags) == (version == "8.2.1")
    assert ("--memPoolSize=workspace:256" in flags) == (version != "8.2.1")


def test_timing_means_the_same_in_every_version() -> None:
    """Version 11 changed its defaults: copies are put back, CUDA graphs taken out: numbers compare."""
    assert not {"--includeDataTransfers", "--noCudaGraph"} & set(time_flags("10.3.0", 10, "t.json"))
    assert {"--includeDataTransfers", "--noCudaGraph", "--noSpinWait"} <= set(
        time_flags("11.4.1", 10, "t.json")
    )


TIMES = [
    {"startEnqMs": 0, "h2dMs": 0.1, "computeMs": 5.0, "d2hMs": 0.05, "latencyMs": 5.15, "endToEndMs": 9.9},
    {"startEnqMs": 6, "h2dMs": 0.1, "computeMs": 5.5, "d2hMs": 0.05, "latencyMs": 5.65, "endToEndMs": 9.9},
]


def test_times_are_read_by_scope() -> None:
    """Each scope has its field of --exportTimes."""
    assert read_times(TIMES) == {
        "engine": [5.0, 5.5],
        "copy_in": [0.1, 0.1],
        "copy_out": [0.05, 0.05],
        "engine_with_copies": [5.15, 5.65],
    }


@pytest.fixture
def board(
    tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch, agent_python: Callable[[str], str]
) -> Callable[[str], Session]:
    """A session with a board whose trtexec is a script."""

    def make(script: str) -> Session:
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "trtexec").write_text("#!/bin/sh\n" + script)
        (folder / "trtexec").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        monkeypatch.setenv("PYTHONPATH", str(HERE / "doubles"))
        monkeypatch.setenv("EDGEPRUNE_TEST_TENSORRT", "8.2.1")
        return Session(load_target("jetson-nano"), Local(work, agent_python("3.6")))

    return make


def test_an_engine_is_built_and_timed_with_trtexec(board: Callable[[str], Session], model: Path) -> None:
    """--via trtexec gives an engine under its own key, and its times come back."""
    session = board(
        f"""
for argument; do
  case "$argument" in
    --saveEngine=*) printf 'ENGINE' > "${{argument#*=}}" ;;
    --exportTimes=*) echo '{json.dumps(TIMES)}' > "${{argument#*=}}" ;;
  esac
done
echo '&&&& PASSED TensorRT.trtexec [TensorRT v8201] # trtexec'
"""
    )
    engine = session.build(model, "fp16", options={"via": "trtexec", "workspace_mib": 99})
    assert engine.log == ("trtexec --workspace=99 --buildOnly --fp16",)
    assert engine.size_bytes == len("ENGINE")
    assert session.time_with_trtexec(engine, runs=2)["engine"] == (5.0, 5.5)


@pytest.mark.parametrize(
    ("script", "kind", "said"),
    [
        (
            "echo '[E] Error[4]: no such node'; echo '&&&& FAILED TensorRT.trtexec'; exit 1",
            "trtexec",
            "no such node",
        ),
        ("echo 'it says nothing of PASSED'", "trtexec", "trtexec failed"),
        ("kill -9 $$", "killed", "most likely for memory"),
    ],
)
def test_a_failure_of_trtexec_is_said(
    board: Callable[[str], Session], work: Path, model: Path, script: str, kind: str, said: str
) -> None:
    """Its error line, its missing PASSED and its being killed: one line each, and no engine."""
    with pytest.raises(DeviceError, match=said) as raised:
        board(script).build(model, options={"via": "trtexec"})
    assert raised.value.kind == kind
    assert not list((work / "engines").glob("*.engine*"))
