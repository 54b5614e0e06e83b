"""The real TensorRT parser and builder on a CPU: tensorrt-rtx, a test extra (`pip install edgeprune[rtx]`).

It proves that a file parses and builds, never how fast an engine of a Jetson is.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from edgeprune.data.errors import EdgePruneError


class BuildError(EdgePruneError):
    """TensorRT refused a file: what the parser said, or the builder's log."""


@cache
def _logger() -> Any:
    """The process's logger: TensorRT goes on using the first that it is given."""
    import tensorrt_rtx as trt

    class Errors(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Errors()


def build_engine(path: Path, profiles: dict[str, tuple[tuple[int, ...], ...]] | None = None) -> bytes:
    """Parse and build an ONNX file; the test that calls it is skipped where tensorrt-rtx is not installed.

    Args:
        profiles: input name -> smallest, usual and largest shape, where a shape is free.

    Raises:
        BuildError: If TensorRT does not parse or build it.
    """
    trt = pytest.importorskip("tensorrt_rtx", reason="the extra rtx is not installed")
    logger = _logger()
    logger.errors.clear()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(path.read_bytes()) or network.num_outputs == 0:
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        said = [f"{error.node_name()}: {error.desc()}" for error in errors]
        raise BuildError(f"TensorRT cannot parse {path}: {'; '.join(said) or 'it is empty'}")
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    if profiles:
        profile = builder.create_optimization_profile()
        for name, shapes in profiles.items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError(f"TensorRT cannot build {path}: {'; '.join(logger.errors)}")
    return bytes(engine)
