"""The targets that edgeprune knows."""

from typing import Any

import pytest

from edgeprune.deploy.errors import TargetError
from edgeprune.deploy.records import DeviceInfo
from edgeprune.deploy.targets import check_device, detect_target, known_targets, load_target

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


def probed(board: str, **changes: Any) -> DeviceInfo:
    fields: dict[str, Any] = {
        "target": "linux",
        "transport": "board",
        "board": board,
        "machine": "aarch64",
        "system": "Linux",
        "python": "3.6.9",
        "l4t": "32.7.6",
        "cpus": 4,
        "memory_mib": {"total": 1979, "available": 900, "swap_total": 0, "swap_free": 0},
        "temperatures_c": {},
        "images": "opencv 4.1.1",
        "backend": "tensorrt",
        "backends": {"tensorrt": {"version": "8.2.1.8", "compute_capability": "5.3"}},
    }
    return DeviceInfo(**{**fields, **changes})


@pytest.mark.parametrize(
    ("model", "name"),
    [
        # /proc/device-tree/model of NVIDIA's kits
        ("NVIDIA Jetson Nano Developer Kit", "jetson-nano"),
        ("quill", "jetson-tx2"),
        ("NVIDIA Jetson Xavier NX Developer Kit", "jetson-xavier-nx"),
        ("Jetson-AGX", "jetson-agx-xavier"),
        ("NVIDIA Jetson Orin Nano Developer Kit", "jetson-orin-nano"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", "jetson-orin-nx"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "jetson-agx-orin"),
        ("NVIDIA Jetson AGX Thor Developer Kit", "jetson-thor"),
        ("Raspberry Pi 5 Model B Rev 1.0", "linux"),
        ("AMD Ryzen 9 7950X", "linux"),
    ],
)
def test_a_device_is_known_by_its_model(model: str, name: str) -> None:
    """--target auto finds the target of each kit, and takes anything else for a Linux machine."""
    assert detect_target(probed(model)).name == name


def test_what_the_probe_finds_overrides_the_defaults() -> None:
    """A Nano with 2 GB, an Orin with an older or newer TensorRT: what is there counts."""
    nano = load_target("jetson-nano").fitted(probed("NVIDIA Jetson Nano 2GB Developer Kit"))
    assert (nano.tensorrt, nano.python, nano.memory_mib, nano.max_opset) == ("8.2.1.8", "3.6.9", 1979, 13)
    newer = {"tensorrt": {"version": "11.4.0", "compute_capability": "8.7"}}
    orin = load_target("jetson-agx-orin").fitted(probed("NVIDIA Jetson AGX Orin", backends=newer))
    assert (orin.tensorrt, orin.max_opset) == ("11.4.0", 17)
    assert load_target("linux").fitted(probed("Raspberry Pi 5")).tensorrt is None


def test_a_board_of_another_kind_is_refused() -> None:
    """Another compute capability than the target's is refused, with the target that fits."""
    check_device(load_target("jetson-nano"), probed("NVIDIA Jetson Nano Developer Kit"))
    with pytest.raises(TargetError, match=r"capability 5\.3.*--target jetson-nano.*--force"):
        check_device(load_target("jetson-agx-orin"), probed("NVIDIA Jetson Nano Developer Kit"))
