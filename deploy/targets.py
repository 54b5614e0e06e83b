"""Targets: kinds of device. Their values are defaults: what a probe finds overrides them."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edgeprune.deploy.errors import TargetError


@dataclass(frozen=True)
class Target:
    """A kind of device."""

    name: str
    board: str | None  # regular expression found in the device model's name
    compute_capability: str | None  # "5.3"; None: no GPU is used
    jetpack: str | None
    tensorrt: str | None  # None: ONNX Runtime on the CPU
    python: str | None  # of the system, which has TensorRT
    max_opset: int  # the highest ONNX opset that is exported for it
    precisions: tuple[str, ...]  # "fp32", "fp16", "int8" in hardware
    channel_multiple: int  # channel counts that its kernels like
    memory_mib: int | None  # of the smallest board of the kind
    dla_cores: int

    @property
    def backend(self) -> str:
        """The agent's backend: "tensorrt" or "onnxruntime"."""
        return "tensorrt" if self.tensorrt else "onnxruntime"

    @property
    def is_jetson(self) -> bool:
        return self.board is not None


@cache
def known_targets() -> dict[str, Target]:
    """All targets by name."""
    text = Path(__file__).with_name("targets.json").read_text(encoding="utf-8")
    return {
        name: Target(name=name, **{**fields, "precisions": tuple(fields["precisions"])})
        for name, fields in json.loads(text).items()
    }


def load_target(name: str) -> Target:
    """Return the target called `name`.

    Raises:
        TargetError: If there is none; the message lists those that are known.
    """
    try:
        return known_targets()[name]
    except KeyError:
        raise TargetError(f"unknown target {name!r}; known: {', '.join(known_targets())}") from None
