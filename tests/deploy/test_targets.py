"""The targets that edgeprune knows."""

import pytest
from edgeprune.deploy.errors import TargetError
from edgeprune.deploy.targets import known_targets, load_target

# Issue 4's list.
NAMES = {
    *("jetson-nano", "jetson-tx2", "jetson-xavier-nx", "jetson-agx-xavier", "jetson-orin-nano"),
    *("jetson-orin-nx", "jetson-agx-orin", "jetson-thor", "host", "linux"),
}


def test_all_targets_are_there() -> None:
    """Every target of the list loads; boards run TensorRT, other machines ONNX Runtime."""
    assert set(known_targets()) == NAMES
    for name in NAMES:
        target = load_target(name)
        assert target.name == name
        assert target.backend == ("tensorrt" if name.startswith("jetson-") else "onnxruntime")


@pytest.mark.parametrize(
    ("name", "capability", "tensorrt", "python", "opset", "int8"),
    [
        ("jetson-nano", "5.3", "8.2.1", "3.6", 13, False),
        ("jetson-tx2", "6.2", "8.2.1", "3.6", 13, False),
        ("jetson-xavier-nx", "7.2", "8.5.2", "3.8", 17, True),
        ("jetson-agx-orin", "8.7", "10.3", "3.10", 17, True),
        ("jetson-thor", "11.0", "10.16", "3.12", 17, True),
    ],
)
def test_boards_have_their_facts(
    *, name: str, capability: str, tensorrt: str, python: str, opset: int, int8: bool
) -> None:
    """The values are those of NVIDIA's documentation for the board's last JetPack."""
    target = load_target(name)
    assert (target.compute_capability, target.tensorrt, target.python) == (capability, tensorrt, python)
    assert target.max_opset == opset
    assert ("int8" in target.precisions) == int8


def test_an_unknown_target_lists_the_known() -> None:
    """A wrong name is answered with all the right ones."""
    with pytest.raises(TargetError) as raised:
        load_target("jetson-mega")
    assert all(name in str(raised.value) for name in NAMES)
