"""A small ONNX model with a detector's interface, and images, made without edgeprune."""

from pathlib import Path

import cv2
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE = (32, 48)  # (H, W)
CANDIDATES = np.array([[0, 0, 20, 20], [1, 1, 20, 20], [24, 8, 40, 30], [10, 10, 30, 30]], np.float32)


def write_model(path: Path, weight: float = 0.01, opset: int = 13) -> Path:
    """Four fixed boxes; their scores are sigmoids of the image's mean times -1, 1, 2, 3 times `weight`."""
    factors = np.array([[-1, 1, 2, 3]], np.float32) * weight
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "last"], ["column"]),
        helper.make_node("Mul", ["column", "factors"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["scores"]),
        helper.make_node("Identity", ["candidates"], ["boxes"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, (1, 3, *SIZE))],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, (1, 4, 4)),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, (1, 4)),
        ],
        [
            numpy_helper.from_array(np.array([1], np.int64), "last"),
            numpy_helper.from_array(factors, "factors"),
            numpy_helper.from_array(CANDIDATES[None], "candidates"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def write_images(folder: Path, count: int = 3) -> dict[int, Path]:
    """PNG images of several sizes, by image id."""
    files = {}
    for index in range(count):
        generator = np.random.default_rng(index)
        image = generator.integers(0, 256, (40 + 8 * index, 60, 3), dtype=np.uint8)
        files[100 + index] = folder / f"image-{index}.png"
        assert cv2.imwrite(str(files[100 + index]), image)
    return files
