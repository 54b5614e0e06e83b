"""Weight files: every format gives the same network, and what is no weight file is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from edgeprune.detectors.nanodet import NanoDetG
from edgeprune.detectors.weights import COCO_CLASSES, WeightsError, load_nanodet


@pytest.fixture(scope="module")
def coco() -> NanoDetG:
    """A detector of 80 classes whose weights are exact in float16."""
    torch.manual_seed(0)
    return NanoDetG((64, 64), COCO_CLASSES).half().float()


def convolutions(detector: NanoDetG) -> list[nn.Conv2d]:
    """In the order in which the description lists them, found by running the network."""
    order: list[nn.Conv2d] = []
    hooks = [
        module.register_forward_hook(lambda module, *_: order.append(module))
        for module in detector.modules()
        if isinstance(module, nn.Conv2d)
    ]
    detector(torch.zeros(1, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    return order


def write_npz(detector: NanoDetG, folder: Path) -> Path:
    arrays = {}
    for number, convolution in enumerate(convolutions(detector)):
        arrays[f"conv{number:02}_w"] = convolution.weight.detach().half().numpy()
        arrays[f"conv{number:02}_b"] = convolution.bias.detach().half().numpy()  # type: ignore[union-attr]
    np.savez(folder / "weights.npz", **arrays)
    return folder / "weights.npz"


def write_tensorflow_js(detector: NanoDetG, folder: Path) -> Path:
    """A graph model as tfjs lays it out, its tensors in another order than its convolutions."""
    nodes, weights, data = [], [], []
    for number, convolution in reversed(list(enumerate(convolutions(detector)))):
        name = "PartitionedCall/convolution" + (f"_{number}" if number else "")
        nodes.append({"name": f"add{number}", "op": "Add", "input": [name, f"bias{number}"]})
        nodes.append({"name": name, "op": "Conv2D", "input": ["images", f"kernel{number}"]})
        kernel = convolution.weight.detach().half().permute(2, 3, 1, 0).contiguous().numpy()
        bias = convolution.bias.detach().half().numpy()  # type: ignore[union-attr]
        padding = np.array([[0, 0], [1, 1]], np.int32)
        weights.append({"name": f"pad{number}", "shape": [2, 2], "dtype": "int32"})
        for kind, array in (("kernel", kernel), ("bias", bias)):
            quantization = {"dtype": "float16", "original_dtype": "float32"}
            entry = {"name": f"{kind}{number}", "shape": list(array.shape), "dtype": "float32"}
            weights.append({**entry, "quantization": quantization})
        data += [padding.tobytes(), kernel.tobytes(), bias.tobytes()]
    manifest = [{"paths": ["model.bin"], "weights": weights}]
    (folder / "model.bin").write_bytes(b"".join(data))
    path = folder / "model.json"
    path.write_text(json.dumps({"modelTopology": {"node": nodes}, "weightsManifest": manifest}))
    return path


def write_safetensors(detector: NanoDetG, folder: Path) -> Path:
    safetensors.torch.save_file(detector.state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def write_checkpoint(detector: NanoDetG, folder: Path) -> Path:
    torch.save({"state_dict": detector.state_dict(), "epoch": 3}, folder / "weights.pt")
    return folder / "weights.pt"


WRITERS = [write_npz, write_tensorflow_js, write_safetensors, write_checkpoint]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("classes", [COCO_CLASSES, ("person",), ("dog", "person")])
def test_every_format_gives_the_same_outputs(
    coco: NanoDetG, tmp_path: Path, write: Callable[[NanoDetG, Path], Path], classes: tuple[str, ...]
) -> None:
    """The detector of some classes gives those channels of the 80-class detector that was written."""
    detector = load_nanodet(write(coco, tmp_path), (64, 64), classes)
    rows = [COCO_CLASSES.index(name) for name in classes] + list(range(80, 124))
    images = torch.randn(2, 3, 64, 64)
    for found, expected in zip(detector(images), coco(images), strict=True):
        torch.testing.assert_close(found, expected[:, rows])


def test_a_person_detector_reads_back(tmp_path: Path) -> None:
    """A state dict of the person detector loads bit by bit."""
    detector = NanoDetG((64, 64))
    again = load_nanodet(write_safetensors(detector, tmp_path), (64, 64))
    for name, tensor in detector.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("damage", ["truncated", "other bytes", "empty"])
def test_damaged_files_are_refused(
    coco: NanoDetG, tmp_path: Path, write: Callable[[NanoDetG, Path], Path], damage: str
) -> None:
    """A truncated file, one of other bytes and an empty one give an error that names the file."""
    path = write(coco, tmp_path)
    data = path.read_bytes()
    path.write_bytes(
        {"truncated": data[: len(data) // 2], "other bytes": b"\x80\x02hello", "empty": b""}[damage]
    )
    with pytest.raises(WeightsError, match=path.name.replace(".", r"\.")):
        load_nanodet(path, (64, 64))


def test_a_truncated_or_missing_binary_is_refused(coco: NanoDetG, tmp_path: Path) -> None:
    """A TensorFlow.js model whose binary file is short or absent is refused."""
    path = write_tensorflow_js(coco, tmp_path)
    binary = tmp_path / "model.bin"
    binary.write_bytes(binary.read_bytes() + b"\0")
    with pytest.raises(WeightsError, match="bytes"):
        load_nanodet(path, (64, 64))
    binary.unlink()
    with pytest.raises(WeightsError, match=r"model\.json"):
        load_nanodet(path, (64, 64))


def test_a_manifest_cannot_leave_its_folder(coco: NanoDetG, tmp_path: Path) -> None:
    """A binary file outside the model's folder is not read."""
    path = write_tensorflow_js(coco, tmp_path)
    path.write_text(path.read_text().replace('"model.bin"', '"../model.bin"'))
    with pytest.raises(WeightsError, match="outside"):
        load_nanodet(path, (64, 64))


def test_another_network_is_refused(coco: NanoDetG, tmp_path: Path) -> None:
    """Missing, added, misshapen and non-finite tensors and unknown classes are named."""
    state = coco.state_dict()
    path = tmp_path / "weights.safetensors"
    stem = state["stem.weight"]
    for changed, message in (
        (
            {name: tensor for name, tensor in state.items() if name != "stem.bias"},
            "lacks 1 tensors.*stem.bias",
        ),
        ({**state, "stem.scale": torch.ones(3)}, "adds 1 tensors.*stem.scale"),
        ({**state, "stem.weight": stem[:16].contiguous()}, r"stem\.weight has the shape \(16, 3, 3, 3\)"),
        ({**state, "stem.weight": stem * float("nan")}, "not finite"),
    ):
        safetensors.torch.save_file(changed, path)
        with pytest.raises(WeightsError, match=message):
            load_nanodet(path, (64, 64))
    with pytest.raises(WeightsError, match="'pedestrian'"):
        load_nanodet(write_npz(coco, tmp_path), (64, 64), ("pedestrian",))
    with pytest.raises(WeightsError, match="34"):
        np.savez(tmp_path / "few.npz", conv00_w=np.zeros((1, 1, 1, 1)), conv00_b=np.zeros(1))
        load_nanodet(tmp_path / "few.npz", (64, 64))
    with pytest.raises(WeightsError, match="no weight file"):
        load_nanodet(tmp_path / "none.npz", (64, 64))
    with pytest.raises(WeightsError, match=r"\.safetensors"):
        (tmp_path / "weights.txt").write_text("1 2 3")
        load_nanodet(tmp_path / "weights.txt", (64, 64))


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_that_executes_code_is_refused(tmp_path: Path) -> None:
    """A checkpoint with code is not executed, and the error says how to convert it."""
    torch.save({"state_dict": {}, "trap": Trap(tmp_path / "sprung")}, tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match=r"safetensors\.torch\.save_file"):
        load_nanodet(tmp_path / "weights.pt", (64, 64))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.shared_data
def test_the_published_weights(shared: Path) -> None:
    """The published file fills the person detector, finite and with the head's person row."""
    path = shared / "nanodet-g" / "nanodet_g_coco80_convs.npz"
    detector = load_nanodet(path, (320, 320))
    with np.load(path) as arrays:
        for name, module in zip(("29", "31", "33"), detector.heads, strict=True):
            np.testing.assert_array_equal(module.output.bias.detach()[0], arrays[f"conv{name}_b"][0])
            np.testing.assert_array_equal(module.output.bias.detach()[1:], arrays[f"conv{name}_b"][80:])
