"""Reading weight files: arrays and tensors only, nothing that executes code."""

import json
import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from edgeprune.data.errors import EdgePruneError
from edgeprune.detectors.nanodet import BINS, NanoDetG

NESTS = ("state_dict", "model", "sd")  # where checkpoints of trainings keep the weights

Convolution = tuple[NDArray[np.float32], NDArray[np.float32]]  # weight (out, in, kH, kW), bias (out,)

# fmt: off
COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard",
    "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush",
)
# fmt: on


class WeightsError(EdgePruneError):
    """A weight file is missing, damaged or of another network."""


def load_nanodet(path: Path, input_size: tuple[int, int], classes: Sequence[str] = ("person",)) -> NanoDetG:
    """Build NanoDet-g with the weights of a file.

    Args:
        path: the 34 convolutions as `.npz`, the npm package's `nanodet.json` (its `.bin` beside it), or a
            state dict of `NanoDetG` as `.safetensors`, `.pt` or `.pth`. A head of the 80 COCO classes is
            cut to `classes`.
        input_size: ``(H, W)``.
        classes: what to detect; names of COCO, or those that the file's head was made for.

    Raises:
        WeightsError: If the file is missing, damaged, or not of this network.
        DetectorError: If the input size does not fit.
    """
    detector = NanoDetG(input_size, classes)
    if not path.is_file():
        raise WeightsError(f"no weight file at {path}")
    if path.suffix == ".npz":
        state = _named(_read_npz(path), path)
    elif path.suffix in (".json", ".bin"):
        state = _named(_read_tensorflow_js(path.with_suffix(".json")), path)
    else:
        state = read_state_dict(path)

    state = {name: _with_classes(name, tensor, detector.classes, path) for name, tensor in state.items()}
    expected = detector.state_dict()
    check_state_dict(state, expected, path)
    detector.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return detector


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict from `.safetensors`, or from a checkpoint of `torch.save`, where it may be nested.

    Raises:
        WeightsError: If it is neither.
    """
    if path.suffix == ".safetensors":
        try:
            state: dict[str, Tensor] = safetensors.torch.load_file(path)
            return state
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} is no safetensors file, or a damaged one: {error}") from error
    if path.suffix not in (".pt", ".pth"):
        raise WeightsError(f"{path}: weights are read from .npz, .json, .safetensors, .pt or .pth")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is damaged, or holds Python objects besides tensors, which could execute code, and "
            "is not loaded. Where it was made, save model.state_dict() with safetensors.torch.save_file"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{path} is no PyTorch checkpoint, or a damaged one: {error}") from error
    for nest in NESTS:
        if isinstance(loaded, dict) and isinstance(loaded.get(nest), dict):
            loaded = loaded[nest]
    # Beside its tensors a state dict may hold numbers and texts: an epoch, a configuration.
    state = (
        {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
        if isinstance(loaded, dict)
        else {}
    )
    if not state:
        raise WeightsError(f"{path} holds no state dict (names and tensors)")
    return state


def check_state_dict(state: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    """Compare names, shapes and values of a state dict read from `path` with a network's.

    Raises:
        WeightsError: Naming the first difference.
    """
    for problem, names in (
        ("lacks", expected.keys() - state.keys()),
        ("adds", state.keys() - expected.keys()),
    ):
        if names:
            raise WeightsError(
                f"{path} is of another network: it {problem} {len(names)} tensors, first {min(names)}"
            )
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise WeightsError(
                f"{path} is of another network: {name} has the shape {tuple(state[name].shape)}, "
                f"not {tuple(tensor.shape)}"
            )
        if not torch.isfinite(state[name]).all():
            raise WeightsError(f"{path} is damaged: {name} has values that are not finite")


def _convolution_names() -> list[str]:
    """Names of NanoDet-g's convolutions in the order of the files."""
    names = ["stem"]
    for stage, blocks in enumerate((1, 2, 2, 3)):
        names.append(f"stages.{stage}.entry")
        for block in range(blocks):
            names += [f"stages.{stage}.reduce.{block}", f"stages.{stage}.refine.{block}"]
        names.append(f"stages.{stage}.exit")
    names += [f"laterals.{level}" for level in range(3)]
    for level in range(3):
        names += [f"heads.{level}.features", f"heads.{level}.output"]
    return names


def _named(convolutions: Sequence[Convolution], path: Path) -> dict[str, Tensor]:
    names = _convolution_names()
    if len(convolutions) != len(names):
        raise WeightsError(f"{path} has {len(convolutions)} convolutions; nanodet-g has {len(names)}")
    state = {}
    for name, (weight, bias) in zip(names, convolutions, strict=True):
        state[f"{name}.weight"] = torch.from_numpy(weight)
        state[f"{name}.bias"] = torch.from_numpy(bias)
    return state


def _with_classes(name: str, tensor: Tensor, classes: tuple[str, ...], path: Path) -> Tensor:
    """Keep the rows of `classes` where a head has those of COCO."""
    if not re.fullmatch(r"heads\.\d\.output\.(weight|bias)", name):
        return tensor
    if tensor.ndim == 0 or len(tensor) != len(COCO_CLASSES) + 4 * BINS:
        return tensor
    unknown = [name for name in classes if name not in COCO_CLASSES]
    if unknown:
        raise WeightsError(f"{path} knows the 80 classes of COCO; {unknown[0]!r} is none of them")
    rows = [COCO_CLASSES.index(name) for name in classes]
    return tensor[rows + list(range(len(COCO_CLASSES), len(tensor)))]


def _read_npz(path: Path) -> list[Convolution]:
    """Read arrays `conv00_w`, `conv00_b`, `conv01_w`, ..."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            count = sum(name.endswith("_w") for name in arrays.files)
            return [
                (arrays[f"conv{i:02}_w"].astype(np.float32), arrays[f"conv{i:02}_b"].astype(np.float32))
                for i in range(count)
            ]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise WeightsError(f"{path} is no archive of convolutions, or a damaged one: {error}") from error


def _read_tensorflow_js(path: Path) -> list[Convolution]:
    """Read a TensorFlow.js graph model: its convolutions with the biases added to them, by their number.

    The JSON lists the tensors that lie end to end in the binary file; kernels are HWIO, stored as float16.
    """
    try:
        model = json.loads(path.read_bytes())
        tensors = _tensorflow_js_tensors(model, path)
        nodes = model["modelTopology"]["node"]
        added = {node["input"][0]: node["input"][1] for node in nodes if node["op"] == "Add"}
        convolutions = {}
        for node in nodes:
            if node["op"] == "Conv2D" and node["name"] in added:
                number = re.search(r"_(\d+)$", node["name"])
                kernel = tensors[node["input"][1]].transpose(3, 2, 0, 1)
                bias = tensors[added[node["name"]]]
                convolutions[int(number[1]) if number else 0] = (np.ascontiguousarray(kernel), bias)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise WeightsError(
            f"{path} is no TensorFlow.js model, or a damaged one, or its .bin is missing: {error!r}"
        ) from error
    return [convolutions[number] for number in sorted(convolutions)]


def _tensorflow_js_tensors(model: dict[str, Any], path: Path) -> dict[str, NDArray[np.float32]]:
    """Return the float tensors of all groups by name."""
    tensors = {}
    for group in model["weightsManifest"]:
        names = [Path(name) for name in group["paths"]]
        if any(name.name != str(name) for name in names):
            raise WeightsError(f"{path} names binary files outside its folder")
        data = b"".join((path.parent / name).read_bytes() for name in names)
        offset = 0
        for entry in group["weights"]:
            dtype = np.dtype(entry.get("quantization", entry)["dtype"])
            count = int(np.prod(entry["shape"], dtype=np.int64))
            if dtype.kind == "f":
                values = np.frombuffer(data, dtype, count, offset).reshape(entry["shape"])
                tensors[entry["name"]] = values.astype(np.float32)
            offset += count * dtype.itemsize
        if offset != len(data):
            raise WeightsError(f"{path} describes {offset} bytes of weights; its files hold {len(data)}")
    return tensors
