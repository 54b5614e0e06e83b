"""Targets: kinds of device. Their values are defaults: what a probe finds overrides them."""

import json
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from edgeprune.deploy.errors import TargetError
from edgeprune.deploy.records import DeviceInfo


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

    def fitted(self, info: DeviceInfo) -> "Target":
        """This target with what the probe of a device found instead of the defaults."""
        found = info.backends.get("tensorrt", {}).get("version") if self.tensorrt else None
        return replace(
            self,
            tensorrt=found or self.tensorrt,
            python=info.python,
            memory_mib=info.memory_mib["total"] or self.memory_mib,
            max_opset=_max_opset(found) if found else self.max_opset,
        )

    def without_tensorrt(self) -> "Target":
        """This kind of device with ONNX Runtime on its CPU: the results say so."""
        return replace(self, tensorrt=None, precisions=("fp32",))

    @property
    def backend(self) -> str:
        """The agent's backend: "tensorrt" or "onnxruntime"."""
        return "tensorrt" if self.tensorrt else "onnxruntime"

    @property
    def is_jetson(self) -> bool:
        return self.board is not None


def _max_opset(tensorrt: str) -> int:
    major, minor = (int(part) for part in tensorrt.split(".")[:2])
    return 13 if (major, minor) < (8, 5) else 17


def detect_target(info: DeviceInfo) -> Target:
    """The target that a probed device is: by the board's name, else `linux`."""
    for target in known_targets().values():
        if target.board and re.search(target.board, info.board):
            return target
    return load_target("linux")


def check_device(target: Target, info: DeviceInfo) -> None:
    """Refuse a device of another kind than the target's.

    Raises:
        TargetError: If its GPU has another compute capability.
    """
    found = info.compute_capability
    if target.compute_capability and found and found != target.compute_capability:
        raise TargetError(
            f"{info.board} has compute capability {found}, {target.name} has {target.compute_capability}: "
            f"use --target {detect_target(info).name}, or --force if you know better"
        )


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
