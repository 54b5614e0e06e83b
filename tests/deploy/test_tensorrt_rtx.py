"""The TensorRT backend's builder code, unchanged, on a real TensorRT: the one for RTX builds without a GPU.

It is the branch of TensorRT 11: strongly typed. It shows that the calls build an engine, never a Jetson's.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.deploy.errors import DeviceError
from edgeprune.deploy.session import Session
from edgeprune.deploy.targets import load_target
from edgeprune.deploy.transport import Local

HERE = Path(__file__).parent


def write_network(
    path: Path, kind: int = TensorProto.FLOAT, operator: str = "Sigmoid", batch: int | str = 1
) -> Path:
    """A convolution with the detector's outputs; `operator` makes the scores, weights are of type `kind`."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weights = np.random.default_rng(0).normal(size=(8, 3, 3, 3)).astype(dtype)
    nodes = [
        helper.make_node("Cast", ["images"], ["typed"], to=kind),
        helper.make_node("Conv", ["typed", "weights"], ["features"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("ReduceMean", ["features"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node(operator, ["means"], ["chances"], name="last"),
        helper.make_node("Cast", ["chances"], ["scores"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["scores", "last_axis"], ["column"]),
        helper.make_node("Concat", ["column"] * 4, ["boxes"], axis=2),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, (batch, 3, 32, 48))],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, (batch, 8, 4)),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, (batch, 8)),
        ],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(np.array([2]), "last_axis")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


@pytest.fixture
def session(work: Path, monkeypatch: pytest.MonkeyPatch, agent_python: Callable[[str], str]) -> Session:
    # pycuda cannot be built here: its double stands in, and answers for an RTX 30.
    monkeypatch.setenv("PYTHONPATH", f"{HERE / 'rtx'}:{HERE / 'doubles'}")
    monkeypatch.setenv("EDGEPRUNE_TEST_CAPABILITY", "8.6")
    return Session(load_target("jetson-thor"), Local(work, agent_python("rtx")))


def test_it_builds(session: Session, work: Path, tmp_path: Path) -> None:
    """A model becomes an engine, the timing cache is kept, and the same build is found again."""
    model = write_network(tmp_path / "model.onnx")
    engine = session.build(model)
    assert engine.backend_version.startswith("1.7.")
    assert (work / engine.path).stat().st_size == engine.size_bytes > 1000
    assert engine.build_s > 0.01
    assert session.build(model).reused
    assert list((work / "engines").glob("timing-*.cache"))


def test_float16_is_in_the_model(session: Session, tmp_path: Path) -> None:
    """A model with float16 types builds as fp16; without them, or without Q/DQ for int8, it is refused."""
    assert (
        session.build(write_network(tmp_path / "half.onnx", TensorProto.FLOAT16), "fp16").precision == "fp16"
    )
    plain = write_network(tmp_path / "plain.onnx")
    with pytest.raises(DeviceError, match="export it with float16 types"):
        session.build(plain, "fp16")
    with pytest.raises(DeviceError, match="explicit quantisation"):
        session.build(plain, "int8")


def test_a_free_batch_and_a_level(session: Session, tmp_path: Path) -> None:
    """The optimisation profile and the builder's level are accepted as they are set."""
    model = write_network(tmp_path / "free.onnx", batch="batch")
    options = {"batch": [1, 2, 4], "optimization_level": 1, "workspace_mib": 128}
    assert session.build(model, options=options).size_bytes > 1000


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("unknown operator", r"node 3 \(Nonsense last\).*INVALID_NODE|Nonsense"),
        ("cut in half", "MODEL_DESERIALIZE_FAILED"),
        ("empty", "needs one input and the outputs boxes and scores"),
    ],
)
def test_models_that_it_refuses(
    session: Session, work: Path, tmp_path: Path, content: str, said: str
) -> None:
    """TensorRT's own reason reaches the user in one line, and no engine is left."""
    path = write_network(
        tmp_path / "model.onnx", operator="Nonsense" if content.startswith("unknown") else "Sigmoid"
    )
    if content == "cut in half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if content == "empty":
        path.write_bytes(b"")
    with pytest.raises(DeviceError, match=said) as raised:
        session.build(path)
    assert raised.value.kind == "model"
    assert not list((work / "engines").glob("*.engine*"))


def test_a_build_that_fails_gives_the_logs_reason(session: Session, tmp_path: Path) -> None:
    """NonMaxSuppression parses and then does not build: the reason is in TensorRT's log alone."""
    model = onnx.load(write_network(tmp_path / "nms.onnx"))
    graph = model.graph
    graph.node.append(helper.make_node("Unsqueeze", ["scores", "first_axis"], ["score_rows"]))
    graph.node.append(helper.make_node("NonMaxSuppression", ["boxes", "score_rows", "most"], ["chosen"]))
    graph.initializer.append(numpy_helper.from_array(np.array([1]), "first_axis"))
    graph.initializer.append(numpy_helper.from_array(np.array([3]), "most"))
    graph.output.append(helper.make_tensor_value_info("chosen", TensorProto.INT64, ("found", 3)))
    onnx.save(model, tmp_path / "nms.onnx")
    with pytest.raises(DeviceError, match=r"built no engine: .*\[E\]") as raised:
        session.build(tmp_path / "nms.onnx")
    assert raised.value.kind == "build"


def test_without_a_gpu_the_engine_does_not_load(
    session: Session, tmp_path: Path, images: dict[int, Path]
) -> None:
    """Deserialising gives None without a GPU, or ends the process: either way one clear error."""
    engine = session.build(write_network(tmp_path / "model.onnx"))
    with pytest.raises(DeviceError) as raised:
        session.profile(engine, images[100], Preprocessing())
    assert raised.value.kind in ("engine", "crashed", "driver")
