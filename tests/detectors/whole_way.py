"""Prune 30 %, export, compare with ONNX Runtime and run by the agent: what every detector must stand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from edgeprune.data.dataset import Dataset, load_dataset
from edgeprune.data.files import write_json
from edgeprune.deploy.session import image_files, local_session
from edgeprune.deploy.targets import load_target
from edgeprune.detectors.evaluation import detect
from edgeprune.detectors.protocol import Targets
from edgeprune.export.model import check_parity, export_onnx
from edgeprune.pruning.budget import Limits, choose
from edgeprune.pruning.checkpoint import describe, load_step, save_step, trace_detector
from edgeprune.pruning.counting import count
from edgeprune.pruning.graph import Network
from edgeprune.pruning.groups import find_groups
from edgeprune.pruning.records import PrunedDetector
from edgeprune.pruning.surgery import largest_difference, masked, remove

SHARE = 0.3


def write_images(folder: Path, count: int = 3, side: int = 80) -> Dataset:
    """Noise with one bright square each."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        pixels = rng.integers(0, 90, (side, side + 16, 3), dtype=np.uint8)
        x, y, size = (int(value) for value in rng.integers(16, 32, 3))
        pixels[y : y + size, x : x + size] += 140
        assert cv2.imwrite(str(folder / "images" / f"{number}.png"), pixels)
        images.append({"id": number, "file_name": f"{number}.png", "width": side + 16, "height": side})
        box = {"id": number, "image_id": number, "category_id": 1, "bbox": [x, y, size, size]}
        annotations.append({**box, "area": size * size, "iscrowd": 0})
    categories = [{"id": 1, "name": "person"}]
    write_json(
        folder / "images.json", {"images": images, "annotations": annotations, "categories": categories}
    )
    return load_dataset(folder / "images.json", folder / "images")


def shake(network: nn.Module, seed: int = 0) -> None:
    """Give batch norm statistics and scales that a trained network could have, so that nothing cancels out."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            for tensor, low, high in (
                (module.weight.data, 0.7, 1.3),
                (module.bias.data, -0.2, 0.2),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
            ):
                tensor.uniform_(low, high, generator=generator)


def pruned(network: Network) -> Network:
    """30 % of the parameters gone, by random importance; exact, as the masked network shows."""
    groups = find_groups(network)
    scores = np.random.default_rng(0).random(groups.units + 1)
    original = {p.layer: len(groups.axes[p.weight, p.axis]) for p in groups.producers}
    before = count(network).params
    goal = before * (1 - SHARE)
    limits = Limits(min_channels=2, max_layer_ratio=0.7)
    choice = choose(groups, scores, cost="params", goal=goal, per="none", limits=limits, original=original)
    assert choice.stopped is None
    narrow = remove(groups, choice.units)
    assert 0.6 * before < count(narrow).params <= goal
    images = torch.randn(1, *network.input_shapes[0], generator=torch.Generator().manual_seed(1))
    assert largest_difference(masked(groups, choice.units), narrow, (images,)) < 1e-4
    return narrow


def check_whole_way(name: str, detector: Any, folder: Path) -> PrunedDetector:
    """Prune 30 %, save and load the step, export to the host's opset, compare, run by the agent.

    Returns:
        The step as it was loaded.
    """
    dataset = write_images(folder / "data")
    detector.eval()
    narrow = pruned(trace_detector(detector, detector.input_size)).eval()
    save_step(folder / "step", PrunedDetector(describe(name, detector, narrow), detector, narrow, ()))
    step = load_step(folder / "step")
    target = load_target("host")
    protocol: Any = step.detector
    model = export_onnx(
        protocol, step.network, folder / "model.onnx", opset=target.max_opset, metadata={"detector": name}
    )
    parity = check_parity(protocol, step.network, model.path, dataset)
    assert parity.images == len(dataset)

    session = local_session(target, folder / "device")
    engine = session.build(model.path)
    files = image_files(dataset, folder / "frames")
    found = session.evaluate(engine, files, protocol.preprocessing)
    assert found.not_finite == 0
    for device, host in zip(found.detections, detect(protocol, narrow, dataset), strict=True):
        assert device.image_id == host.image_id
        assert abs(len(device.boxes) - len(host.boxes)) <= 0.02 * len(host.boxes)
        kept = min(len(device.scores), len(host.scores), 20)
        assert kept, "no detection would prove nothing"
        np.testing.assert_allclose(device.scores[:kept], host.scores[:kept], atol=1e-3)
    return step


def check_falling_loss(detector: Any, images: Tensor, targets: Sequence[Targets], steps: int = 8) -> None:
    """A few optimizer steps on a batch lower its loss to less than 70 %."""
    detector.train()
    optimizer = torch.optim.Adam(detector.parameters(), 5e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = detector.loss(detector(images), targets).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.7 * losses[0], losses


def check_per_image(detector: Any, raw: Sequence[Tensor], targets: Sequence[Targets]) -> None:
    """An image's loss is the same alone and in a batch."""
    together = detector.loss(raw, targets)
    assert together.shape == (len(targets),)
    for index, target in enumerate(targets):
        alone = detector.loss([level[index : index + 1] for level in raw], [target])
        torch.testing.assert_close(alone[0], together[index])


def check_gradient(detector: Any, raw: Sequence[Tensor], targets: Sequence[Targets]) -> None:
    """The loss's gradient is that of finite differences, in double precision, at 40 places of large gradient."""
    for buffer_owner in detector.modules():
        for key, buffer in buffer_owner.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(buffer_owner, key, buffer.double())
    targets = [Targets(target.boxes.double(), target.ignore) for target in targets]
    leaves = [level.double().requires_grad_() for level in raw]
    detector.loss(leaves, targets).sum().backward()
    step = 1e-5
    for leaf in leaves:
        assert leaf.grad is not None
        places = leaf.grad.abs().flatten().topk(40 // len(leaves)).indices
        for place in places.tolist():
            values = []
            for sign in (1, -1):
                moved = [other.detach().clone() for other in leaves]
                index = next(i for i, other in enumerate(leaves) if other is leaf)
                moved[index].view(-1)[place] += sign * step
                values.append(detector.loss(moved, targets).sum().item())
            numeric = (values[0] - values[1]) / (2 * step)
            assert abs(numeric - leaf.grad.view(-1)[place].item()) < 1e-3 * max(1.0, abs(numeric))


def some_targets() -> list[Targets]:
    """Two images of 64x64: two objects and an ignored box; none."""
    boxes = torch.tensor([[6.0, 8.0, 30.0, 50.0], [34.0, 30.0, 60.0, 62.0], [40.0, 2.0, 62.0, 20.0]])
    return [
        Targets(boxes, torch.tensor([False, False, True])),
        Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.bool)),
    ]
