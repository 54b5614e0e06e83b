"""The TensorRT backend with doubles of six versions, made from the table of names that each version has.

They show that the agent calls only what a version has, in an order that it accepts. No GPU's engine is built.
"""

import ast
import csv
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from small_model import write_model

from edgeprune.deploy import session as session_module
from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.deploy.errors import DeviceError
from edgeprune.deploy.session import Session
from edgeprune.deploy.targets import load_target
from edgeprune.deploy.transport import Local

HERE = Path(__file__).parent
BACKEND = Path(session_module.__file__).parent / "device" / "backend_tensorrt.py"
PREPROCESSING = Preprocessing("rgb", (100.0, 110.0, 120.0), (60.0, 60.0, 60.0), 30)

# TensorRT, the Python of the JetPack that has it, and a board
VERSIONS = [
    ("8.2.1", "3.6", "5.3"),
    ("8.5.2", "3.8", "7.2"),
    ("8.6.1", "3.10", "8.7"),
    ("10.3.0", "3.10", "8.7"),
    ("10.16.1.11", "3.12", "11.0"),
    ("11.4.0.106", "3.12", "11.0"),
]
TARGETS = {"5.3": "jetson-nano", "7.2": "jetson-xavier-nx", "8.7": "jetson-agx-orin", "11.0": "jetson-thor"}


def table() -> dict[tuple[str, str], set[str]]:
    """(class, name) -> the versions that have it."""
    with (HERE / "trt_names.tsv").open() as file:
        return {
            (row["class"], row["name"]): set(row["versions"].split())
            for row in csv.DictReader(file, delimiter="\t")
        }


@pytest.fixture
def board(
    work: Path, monkeypatch: pytest.MonkeyPatch, agent_python: Callable[[str], str]
) -> Callable[..., Session]:
    """Make a session with a board that has a TensorRT version."""

    def make(version: str, python: str = "3.10", capability: str = "8.7") -> Session:
        monkeypatch.setenv("PYTHONPATH", str(HERE / "doubles"))
        monkeypatch.setenv("EDGEPRUNE_TEST_TENSORRT", version)
        monkeypatch.setenv("EDGEPRUNE_TEST_CAPABILITY", capability)
        return Session(load_target(TARGETS[capability]), Local(work, agent_python(python)))

    return make


def marked(path: Path, producer: str) -> Path:
    """A model whose producer tells the double what to do."""
    model = onnx.load(write_model(path))
    model.producer_name = producer
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(("version", "python", "capability"), VERSIONS)
def test_build_and_inference_use_what_the_version_has(
    *,
    version: str,
    python: str,
    capability: str,
    work: Path,
    board: Callable[..., Session],
    agent_python: Callable[[str], str],
    model: Path,
    images: dict[int, Path],
) -> None:
    """From probe to profile, each version runs; detections equal ONNX Runtime's in the same interpreter."""
    session = board(version, python, capability)
    info = session.probe()
    assert info.backend_version == version
    assert info.compute_capability == capability
    engine = session.build(model)
    assert (engine.backend, engine.backend_version) == ("tensorrt", version)
    assert any("workspace" in line for line in engine.log)
    # The double's contexts need 5 MiB.
    assert engine.memory_mib == pytest.approx(5 + engine.size_bytes / 2**20)
    found = session.evaluate(engine, images, PREPROCESSING)
    host = Session(load_target("host"), Local(work.with_name("host"), agent_python(python)))
    expected = host.evaluate(host.build(model), images, PREPROCESSING)
    for ours, theirs in zip(expected.detections, found.detections, strict=True):
        assert np.array_equal(ours.boxes, theirs.boxes)
        assert np.array_equal(ours.scores, theirs.scores)
    latencies = session.benchmark(
        [engine, engine], list(images.values()), PREPROCESSING, runs=4, block_runs=2
    )
    # The double's clock moves 0.5 ms between the events around the inference, and twice more with the copies.
    assert set(latencies.samples_ms(0, "engine")) == {0.5}
    assert set(latencies.samples_ms(1, "engine_with_copies")) == {1.5}
    assert all(block.images_per_s and block.images_per_s > 0 for block in latencies.blocks)
    profile = session.profile(engine, images[100], PREPROCESSING, runs=2)
    assert profile.times_ms == {"stem": (0.25, 0.25), "head + sigmoid": (0.5, 0.5)}


@pytest.mark.parametrize(
    ("version", "flags"), [("8.2.1", "['fp16']"), ("10.16.1.11", "['fp16']"), ("11.4.0.106", "[]")]
)
def test_fp16_is_a_flag_before_11_and_a_type_later(
    version: str, flags: str, board: Callable[..., Session], tmp_path: Path
) -> None:
    """With weak types a flag asks for fp16; with strong types the model must have it, or is refused."""
    session = board(version)
    engine = session.build(marked(tmp_path / "half.onnx", "half"), "fp16")
    assert any(f"flags {flags}" in line for line in engine.log)
    if version.startswith("11."):
        with pytest.raises(DeviceError, match="export it with float16 types"):
            session.build(write_model(tmp_path / "plain.onnx"), "fp16")


def test_int8_needs_explicit_quantisation_and_hardware(board: Callable[..., Session], tmp_path: Path) -> None:
    """A model without Q/DQ is refused; so is a GPU without int8; a quantised model is built for both."""
    session = board("10.3.0")
    with pytest.raises(DeviceError, match="Q/DQ"):
        session.build(write_model(tmp_path / "plain.onnx"), "int8")
    engine = session.build(marked(tmp_path / "int8.onnx", "int8"), "int8")
    assert any("['fp16', 'int8']" in line for line in engine.log)
    nano = board("8.2.1", capability="5.3")
    with pytest.raises(DeviceError, match="no int8 in hardware"):
        nano.build(tmp_path / "int8.onnx", "int8")


def test_a_free_batch_gets_a_profile(
    board: Callable[..., Session], tmp_path: Path, images: dict[int, Path]
) -> None:
    """A model whose batch is free is built with the range asked for and runs at its middle."""
    for version in ("8.2.1", "10.3.0"):
        free = onnx.load(write_model(tmp_path / "free.onnx"))
        for value in (*free.graph.input, free.graph.output[1]):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
        free.graph.node[-1].op_type = "Expand"  # the boxes for each image of the batch
        free.graph.node[-1].input.append("repeats")
        free.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2, 4, 4], np.int64), "repeats"))
        free.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "batch"
        onnx.save(free, tmp_path / "free.onnx")
        session = board(version)
        engine = session.build(tmp_path / "free.onnx", options={"batch": [1, 2, 4]})
        [first, *_] = session.evaluate(engine, images, PREPROCESSING).detections
        assert len(first.scores) == 3


def test_throughput_keeps_two_images_in_flight(
    *,
    board: Callable[..., Session],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    images: dict[int, Path],
) -> None:
    """While the GPU is waited for the other stream has work, until the last image; latencies have one."""
    session = board("10.3.0")
    engine = session.build(model)
    waits = tmp_path / "waits"
    monkeypatch.setenv("EDGEPRUNE_TEST_STREAMS", str(waits))
    found = session.benchmark(
        [engine], [images[100]], PREPROCESSING, runs=6, block_runs=6, scopes=["throughput"]
    )
    [block] = found.blocks
    assert block.samples_ms == {}
    assert block.images_per_s is not None and block.images_per_s > 0
    assert waits.read_text().split()[-8:] == ["1"] * 7 + ["0"]
    alone = session.benchmark([engine], [images[100]], PREPROCESSING, runs=1, scopes=["engine"])
    assert alone.blocks[0].images_per_s is None
    assert waits.read_text().split()[-10:] == ["0"] * 10


def test_throughput_is_left_out_where_memory_is_short(
    board: Callable[..., Session], monkeypatch: pytest.MonkeyPatch, model: Path, images: dict[int, Path]
) -> None:
    """With room for one image's tensors and not for two, latencies are measured and throughput is not."""
    session = board("10.3.0")
    engine = session.build(model)
    monkeypatch.setenv("EDGEPRUNE_TEST_GPU_BYTES", str(3 * 32 * 48 * 4 * 3 // 2))
    found = session.benchmark([engine], [images[100]], PREPROCESSING, runs=2, block_runs=2)
    assert found.blocks[0].images_per_s is None
    assert len(found.samples_ms(0, "engine")) == 2


def test_a_free_batch_has_no_throughput(
    board: Callable[..., Session], tmp_path: Path, images: dict[int, Path]
) -> None:
    """Two contexts cannot share a range of shapes in every version: not measured, and no failure."""
    free = onnx.load(write_model(tmp_path / "free.onnx"))
    for value in (*free.graph.input, free.graph.output[1]):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(free, tmp_path / "free.onnx")
    session = board("8.2.1")
    engine = session.build(tmp_path / "free.onnx")
    found = session.benchmark([engine], list(images.values()), PREPROCESSING, runs=2, block_runs=2)
    assert found.blocks[0].images_per_s is None
    assert len(found.samples_ms(0, "engine_with_copies")) == 2


def test_options_of_the_builder(board: Callable[..., Session], tmp_path: Path, model: Path) -> None:
    """Workspace, optimisation level and DLA reach the builder; what a version or board lacks is said."""
    session = board("10.3.0")
    half = marked(tmp_path / "half.onnx", "half")
    engine = session.build(
        half, "fp16", options={"workspace_mib": 77, "optimization_level": 1, "dla_core": 1}
    )
    assert any("workspace 77 MiB, flags ['fp16', 'gpu-fallback']" in line for line in engine.log)
    with pytest.raises(DeviceError, match="core 2 of the DLA was asked for; this device has 2"):
        session.build(half, "fp16", options={"dla_core": 2})
    with pytest.raises(DeviceError, match="fp16 and int8 only"):
        session.build(model, options={"dla_core": 0})
    engine = board("8.2.1").build(model, options={"optimization_level": 1})
    assert any("no optimisation levels: left out" in line for line in engine.log)


def test_a_build_without_memory_is_tried_with_less(board: Callable[..., Session], tmp_path: Path) -> None:
    """TensorRT's own complaint about memory leads to one more try with a quarter of the workspace."""
    engine = board("8.2.1").build(marked(tmp_path / "m.onnx", "no-memory"), options={"workspace_mib": 400})
    workspaces = [line for line in engine.log if "workspace" in line and "MiB, flags" in line]
    assert ["400" in workspaces[0], "100" in workspaces[1]] == [True, True]


@pytest.mark.parametrize(
    ("producer", "kind", "said"),
    [("no-engine", "build", "no implementation for node /head/Mod"), ("crash", "crashed", "SIGSEGV")],
)
def test_a_failed_build_says_why(
    producer: str, kind: str, said: str, board: Callable[..., Session], tmp_path: Path
) -> None:
    """The reason is in TensorRT's log alone, and is found there; a crash is a result too."""
    with pytest.raises(DeviceError, match=said) as raised:
        board("8.2.1").build(marked(tmp_path / "m.onnx", producer))
    assert raised.value.kind == kind


@pytest.mark.parametrize(
    ("version", "where"), [("8.2.1", "node 3:"), ("10.3.0", r"node 3 \(Mod /head/Mod\)")]
)
def test_a_model_that_the_parser_refuses_names_the_node(
    version: str, where: str, board: Callable[..., Session], tmp_path: Path
) -> None:
    """Node and operator are named where the version tells them; an empty model is no model."""
    (tmp_path / "bad.onnx").write_bytes(b"\x08")
    with pytest.raises(DeviceError, match=where):
        board(version).build(tmp_path / "bad.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(DeviceError, match="needs one input and the outputs boxes and scores"):
        board(version).build(tmp_path / "empty.onnx")


def test_an_engine_of_another_tensorrt_is_not_loaded(
    board: Callable[..., Session], model: Path, images: dict[int, Path]
) -> None:
    """After an update of TensorRT the old engine is refused, and the same command builds a new one."""
    old = board("8.2.1").build(model)
    session = board("8.5.2")
    with pytest.raises(DeviceError, match=r"built for backend_version '8\.2\.1'; here it is '8\.5\.2'"):
        session.evaluate(old, images, PREPROCESSING)
    new = session.build(model)
    assert not new.reused
    assert session.evaluate(new, images, PREPROCESSING).detections


def test_a_board_of_another_kind_is_not_given_an_engine(
    board: Callable[..., Session], model: Path, images: dict[int, Path]
) -> None:
    """An engine belongs to the compute capability that it was built on."""
    engine = board("8.5.2", capability="7.2").build(model)
    with pytest.raises(DeviceError, match=r"compute_capability '7\.2'; here it is '8\.7'"):
        board("8.5.2", capability="8.7").evaluate(engine, images, PREPROCESSING)


def test_a_damaged_timing_cache_is_replaced(
    board: Callable[..., Session], work: Path, tmp_path: Path
) -> None:
    """Kernel times are kept for the next build; a damaged file is no obstacle."""
    session = board("10.3.0")
    session.build(write_model(tmp_path / "1.onnx"))
    [cache] = (work / "engines").glob("timing-*10.3.0.cache")
    assert cache.read_bytes() == b"cache."
    session.build(write_model(tmp_path / "2.onnx", weight=0.02))
    assert cache.read_bytes() == b"cache.."
    cache.write_bytes(b"damaged")
    session.build(write_model(tmp_path / "3.onnx", weight=0.03))
    assert cache.read_bytes() == b"cache."


def test_what_is_missing_on_the_board_is_said(
    board: Callable[..., Session], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No TensorRT, no pycuda, no driver: each has its own line with the remedy."""
    session = board("8.2.1")
    monkeypatch.setenv("EDGEPRUNE_TEST_NO_DRIVER", "1")
    with pytest.raises(DeviceError, match="no CUDA-capable device"):
        session.build(model)
    broken = tmp_path / "broken"
    (broken / "pycuda").mkdir(parents=True)
    (broken / "pycuda" / "__init__.py").write_text("raise ImportError('libcurand.so.10: cannot open')")
    monkeypatch.setenv("PYTHONPATH", f"{broken}:{HERE / 'doubles'}")
    with pytest.raises(DeviceError, match=r"pycuda cannot be imported.*nvcc on the PATH") as raised:
        session.build(model)
    assert raised.value.kind == "pycuda"
    assert [check for check in session.doctor() if check.name == "pycuda" and check.ok is False]
    monkeypatch.delenv("PYTHONPATH")
    with pytest.raises(DeviceError, match=r"TensorRT cannot be imported.*system's python3"):
        session.build(model)


def attributes() -> set[str]:
    """Every attribute that the backend's code reads or writes."""
    return {
        node.attr
        for node in ast.walk(ast.parse(BACKEND.read_text()))
        if isinstance(node, ast.Attribute) and not node.attr.startswith("_")
    }


# pycuda as its documentation names it (documen.tician.de/pycuda/driver.html).
PYCUDA = {
    *(
        "init",
        "Device",
        "compute_capability",
        "name",
        "total_memory",
        "make_context",
        "pop",
        "detach",
        "Stream",
    ),
    *("handle", "synchronize", "Event", "record", "time_till", "mem_alloc", "pagelocked_empty", "Error"),
    *("memcpy_htod_async", "memcpy_dtoh_async", "driver"),
}
# The standard library's, numpy's and our own.
OTHERS = {
    *(
        "path",
        "join",
        "isfile",
        "getsize",
        "getpid",
        "replace",
        "fstat",
        "st_size",
        "st_mode",
        "S_ISREG",
        "append",
        "get",
    ),
    *("read", "write", "seek", "decode", "splitlines", "strip", "lower", "format", "isalnum", "setdefault"),
    *(
        "float32",
        "float16",
        "int32",
        "int8",
        "bool_",
        "uint8",
        "ndarray",
        "copyto",
        "astype",
        "dtype",
        "nbytes",
    ),
    *(
        "enter",
        "leave",
        "users",
        "context",
        "save",
        "lines",
        "reason",
        "says",
        "names",
        "set_shape",
        "set_addresses",
        "enqueue",
    ),
    *(
        "is_input",
        "images",
        "boxes",
        "scores",
        "stream",
        "free_batch",
        "perf_counter",
        "host",
        "device",
        "times_ms",
        "program",
        "build",
        "input_size",
        "profile",
        "close",
        "shape",
    ),
}


def test_every_name_is_in_the_table() -> None:
    """Each attribute in the backend is TensorRT's in some version, pycuda's, or known as somebody else's."""
    tensorrt = {name for _, name in table()} | {kind for kind, _ in table()}
    assert attributes() - tensorrt - PYCUDA - OTHERS - {"uint8"} == set()


def test_the_double_has_the_names_of_its_version(tmp_path: Path, agent_python: Callable[[str], str]) -> None:
    """What the table says a version lacks is an AttributeError in the double: the tests above can fail."""
    code = """
import tensorrt as trt
config = trt.Builder(trt.Logger()).create_builder_config()
print(hasattr(config, "max_workspace_size"), hasattr(config, "set_memory_pool_limit"))
flags, engine = trt.BuilderFlag, trt.ICudaEngine
print(hasattr(flags, "FP16"), hasattr(trt, "TensorIOMode"), hasattr(engine, "get_tensor_name"))
try:
    config.builder_optimization_level = 3
    print("settable")
except AttributeError as error:
    print(error)
"""
    said = {}
    for version in ("8.2.1", "11.4.0.106"):
        environment = {"PYTHONPATH": str(HERE / "doubles"), "EDGEPRUNE_TEST_TENSORRT": version}
        command = [agent_python("3.10"), "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        said[version] = done.stdout.splitlines()
    assert said["8.2.1"][:2] == ["True False", "True False False"]
    assert "no IBuilderConfig.builder_optimization_level" in said["8.2.1"][2]
    assert said["11.4.0.106"][0] == "False True"
    assert said["11.4.0.106"][1].startswith("False True")
    assert said["11.4.0.106"][2] == "settable"
