"""A user's own detector: a function in a module or a file that returns an `nn.Module` (docs/own-detector.md)."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from torch import nn

from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.detectors.protocol import DetectorError
from edgeprune.detectors.weights import check_state_dict, read_state_dict

Builder = Callable[[tuple[int, int], Sequence[str]], nn.Module]


def is_own(name: str) -> bool:
    """Whether a detector's name is ``package.module:function`` or ``file.py:function``."""
    module, colon, function = name.rpartition(":")
    return bool(module and colon and function.isidentifier())


def build_own(name: str) -> Builder:
    """Find the function that a name stands for; what it builds is checked against the protocol.

    Raises:
        DetectorError: If module, file or function is not there. Errors inside the user's code stay as they are.
    """
    place, _, function_name = name.rpartition(":")
    module = _file(Path(place)) if place.endswith(".py") else _module(place)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise DetectorError(f"{place} has no function {function_name!r}")

    def build(input_size: tuple[int, int], classes: Sequence[str]) -> nn.Module:
        detector = function(input_size, tuple(classes))
        _check(name, detector, input_size, tuple(classes))
        assert isinstance(detector, nn.Module)
        return detector

    return build


def load_own(name: str, path: Path, input_size: tuple[int, int], classes: Sequence[str]) -> nn.Module:
    """Build a user's detector with the state dict of a file; names and shapes must be its own.

    Raises:
        DetectorError: If the detector cannot be found or does not follow the protocol.
        WeightsError: If the file is missing, damaged, or of another network.
    """
    detector = build_own(name)(input_size, classes)
    state, expected = read_state_dict(path), detector.state_dict()
    check_state_dict(state, expected, path)
    detector.load_state_dict({key: state[key].to(tensor.dtype) for key, tensor in expected.items()})
    return detector


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise DetectorError(f"no file at {path}")
    name = "edgeprune_own_" + path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and the like look their module up
    spec.loader.exec_module(module)
    return module


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise  # found, but something that it imports is missing
        raise DetectorError(
            f"no module {name} is installed; a file is named as path/to/file.py:function"
        ) from error


def _check(name: str, detector: object, input_size: tuple[int, int], classes: tuple[str, ...]) -> None:
    problem = None
    if not isinstance(detector, nn.Module):
        problem = f"returned {type(detector).__name__}, not an nn.Module"
    elif missing := [part for part in ("loss", "decode") if not callable(getattr(detector, part, None))]:
        problem = f"returned a module without the method {missing[0]}"
    elif not isinstance(getattr(detector, "preprocessing", None), Preprocessing):
        problem = "returned a module whose preprocessing is no edgeprune.deploy.device.imaging.Preprocessing"
    else:
        for attribute, asked in (("input_size", input_size), ("classes", classes)):
            found = getattr(detector, attribute, None)
            if not isinstance(found, tuple) or found != asked:
                problem = f"returned a module whose {attribute} is {found!r}, not {asked!r}"
                break
    if problem:
        raise DetectorError(f"{name} {problem}; docs/own-detector.md says what edgeprune asks for")
