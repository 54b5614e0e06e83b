"""A user's own detector: the documented example is pruned and run; what breaks the protocol is named."""

import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from whole_way import check_falling_loss, check_whole_way, shake, some_targets

from edgeprune.detectors.protocol import DetectorError
from edgeprune.detectors.registry import build_detector, load_detector, save_weights, slug
from edgeprune.detectors.weights import WeightsError

EXAMPLE = f"{Path(__file__).resolve().parents[2] / 'docs' / 'own_detector.py'}:small_detector"


def test_the_documented_example_goes_the_whole_way(tmp_path: Path) -> None:
    """docs/own_detector.py: its loss falls, 30 % are pruned, the step is rebuilt by its name, exported and run."""
    torch.manual_seed(0)
    detector = build_detector(EXAMPLE, (64, 64))
    check_falling_loss(detector, torch.randn(2, 3, 64, 64), some_targets())
    shake(detector)
    step = check_whole_way(EXAMPLE, detector, tmp_path)
    assert step.spec.name == EXAMPLE


def test_its_loss_ignores_what_is_marked() -> None:
    """The example's loss of an image whose every cell is ignored is 0, and it does not mix images."""
    detector = build_detector(EXAMPLE, (64, 64)).eval()
    raw = detector(torch.randn(2, 3, 64, 64))
    targets = some_targets()
    alone = detector.loss(raw[:1], targets[:1])
    torch.testing.assert_close(alone[0], detector.loss(raw, targets)[0])
    whole = targets[0]._replace(boxes=torch.tensor([[-1.0, -1.0, 65.0, 65.0]]), ignore=torch.tensor([True]))
    assert detector.loss(raw[:1], [whole]).item() == 0


def test_weights(tmp_path: Path) -> None:
    """A state dict fills it; another network's is refused; what adapt saved is read back."""
    torch.manual_seed(0)
    detector = build_detector(EXAMPLE, (64, 64))
    safetensors.torch.save_file(detector.state_dict(), tmp_path / "w.safetensors")
    torch.save(detector.state_dict(), tmp_path / "w.pt")
    save_weights(tmp_path / "adapted.safetensors", EXAMPLE, detector)
    for name in ("w.safetensors", "w.pt", "adapted.safetensors"):
        again = load_detector(EXAMPLE, tmp_path / name, (64, 64))
        assert torch.equal(again.head.weight, detector.head.weight)
    assert isinstance(load_detector(EXAMPLE, None, (64, 64)), torch.nn.Module)
    torch.save({"weight": torch.ones(3)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="another network"):
        load_detector(EXAMPLE, tmp_path / "w.pt", (64, 64))
    with pytest.raises(WeightsError, match="ask for these"):
        load_detector(EXAMPLE, tmp_path / "adapted.safetensors", (64, 64), ("dog",))


def test_a_function_of_an_installed_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """package.module:function is imported by name; an error inside the module stays as it is."""
    (tmp_path / "bring_own.py").write_text(Path(EXAMPLE.rpartition(":")[0]).read_text())
    (tmp_path / "bring_broken.py").write_text("import not_installed_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert build_detector("bring_own:small_detector", (64, 64)).classes == ("person",)
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all"):
        build_detector("bring_broken:function", (64, 64))
    sys.modules.pop("bring_own")


WRONG = """
from torch import nn
from edgeprune.deploy.device.imaging import Preprocessing

class Good(nn.Module):
    preprocessing = Preprocessing()
    def __init__(self, input_size, classes):
        super().__init__()
        self.input_size, self.classes = input_size, classes
    def loss(self, raw, targets): ...
    def decode(self, raw): ...

def number(input_size, classes):
    return 3

def no_decode(input_size, classes):
    module = Good(input_size, classes)
    module.decode = None
    return module

def no_preprocessing(input_size, classes):
    module = Good(input_size, classes)
    module.preprocessing = {"color": "rgb"}
    return module

def other_size(input_size, classes):
    return Good((32, 32), classes)

def other_classes(input_size, classes):
    return Good(input_size, ["person"])
"""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("number", "returned int, not an nn.Module"),
        ("no_decode", "without the method decode"),
        ("no_preprocessing", "preprocessing"),
        ("other_size", r"input_size is \(32, 32\), not \(64, 64\)"),
        ("other_classes", "classes is"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_what_breaks_the_protocol(function: str, message: str, tmp_path: Path) -> None:
    """What is missing is named, before any work."""
    (tmp_path / "wrong.py").write_text(WRONG)
    with pytest.raises(DetectorError, match=message):
        build_detector(f"{tmp_path / 'wrong.py'}:{function}", (64, 64))


def test_what_is_not_there() -> None:
    """A missing file, a missing module and a name that is neither say what would do."""
    for name, message in (
        ("nowhere/net.py:make", "no file at"),
        ("no_such_package.net:make", "no module no_such_package.net"),
        ("resnet", "package.module:function"),
        ("file.py:not a name", "unknown detector"),
    ):
        with pytest.raises(DetectorError, match=message):
            build_detector(name, (64, 64))


def test_slug() -> None:
    """A detector's name as part of a folder's name has no separators."""
    names = ["nanodet-g", "nets/yolo-fastest.cfg", "/home/me/net.py:make", "package.net:make"]
    assert [slug(name) for name in names] == ["nanodet-g", "yolo-fastest", "net-make", "package.net-make"]
