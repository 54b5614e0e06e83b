"""Importance says what removing a channel does to the loss, whichever way the network is wired."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from small import Attending, Chain, Gated, Loss, Residual, batches, groups_of, pictures, scoring_of, seeded
from torch import Tensor, nn

from edgeprune.data.dataset import load_dataset
from edgeprune.detectors.batches import batches as image_batches
from edgeprune.detectors.canvases import Canvases
from edgeprune.detectors.protocol import Targets
from edgeprune.detectors.registry import load_detector
from edgeprune.pruning.graph import Network, tensors, trace
from edgeprune.pruning.groups import Groups, find_groups
from edgeprune.pruning.importance import (
    CRITERIA,
    ImportanceError,
    Scoring,
    by_layer,
    channel_importance,
    find_criterion,
    score,
)
from edgeprune.pruning.replacement import InputStatistics
from edgeprune.pruning.schedule import PruningOptions
from edgeprune.pruning.surgery import StandIn, masked

WIRINGS = [Chain, Residual, Gated, Attending]
wirings = pytest.mark.parametrize("make", WIRINGS, ids=lambda make: make.__name__)


def losses(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return Loss().loss(network(images), [])


def blended(groups: Groups, unit: int, share: float, statistics: dict[str, InputStatistics]) -> Network:
    """The network in which a unit is a `share` of the way to what stands for it once it is removed."""
    network = masked(
        groups, [unit], {weight: StandIn(None, each.mean) for weight, each in statistics.items()}
    ).double()
    for name, value in tensors(network):
        if name.startswith("matrix_"):
            value.copy_(torch.eye(len(value)) + share * (value - torch.eye(len(value))))
        elif name.startswith("constant_"):
            value.mul_(share)
    return network


def finite_difference(groups: Groups, images: Tensor, statistics: dict[str, InputStatistics]) -> np.ndarray:
    """``(N, units + 1)``: derivative of each image's loss as a unit goes, by central differences."""
    slopes = np.zeros((len(images), groups.units + 1))
    for unit in range(1, groups.units + 1):
        after, before = (
            losses(blended(groups, unit, share, statistics), images.double()) for share in (1e-4, -1e-4)
        )
        slopes[:, unit] = ((after - before) / 2e-4).numpy()
    return slopes


@wirings
@pytest.mark.parametrize("replacement", ["zero", "mean"])
def test_estimates_are_the_derivative_of_the_loss(make: Callable[[], nn.Module], replacement: str) -> None:
    """The signed estimate equals the change of the loss, per part removed, when a unit fades to what replaces
    it. In residual additions summands keep their signs; depthwise and gate chains count once; attention too."""
    groups, images = groups_of(seeded(make)), pictures(4)
    scoring = scoring_of(groups, images, 2, replacement)
    wanted = finite_difference(groups, images, scoring.statistics)
    assert groups.units > 0
    assert np.abs(wanted[:, 1:]).max() > 0.1
    np.testing.assert_allclose(
        scoring.first_order(per_position=False)[:, 1:], wanted[:, 1:], rtol=1e-3, atol=1e-4
    )


def test_taylor_is_the_published_formula_on_a_plain_chain() -> None:
    """On a chain it equals `channel_importance` of activations and gradients caught by module hooks, with an
    L2 norm of 1 a layer."""
    module = seeded(Chain)
    images = pictures(6)
    caught: dict[str, Tensor] = {}
    for name in ("b", "z"):  # what these read is what a and b make

        def keep(part: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            inputs[0].retain_grad()
            caught[name] = inputs[0]

        module.get_submodule(name).register_forward_pre_hook(keep)
    torch.autograd.backward(Loss().loss(module(images), []).sum())
    groups = groups_of(seeded(Chain))
    scores = score("taylor", scoring_of(groups, images))
    for layer, reader in (("a", "b"), ("b", "z")):
        gradient = caught[reader].grad
        assert gradient is not None
        wanted = channel_importance(caught[reader].detach(), gradient)
        np.testing.assert_allclose(scores[groups.channels(layer)], wanted / wanted.norm(), rtol=1e-4)


def test_channel_importance_by_hand() -> None:
    """Two examples, one channel, two positions: |mean(1*1, 2*-3)| and |mean(0, 4*1)|, then their mean."""
    activation = torch.tensor([[[[1.0, 2.0]]], [[[5.0, 4.0]]]])
    gradient = torch.tensor([[[[1.0, -3.0]]], [[[0.0, 1.0]]]])
    assert channel_importance(activation, gradient).tolist() == [(2.5 + 2.0) / 2]
    with pytest.raises(ValueError, match="differ"):
        channel_importance(activation, gradient[:1])


@wirings
@pytest.mark.parametrize("criterion", ["taylor", "taylor-sum", "taylor-weight"])
def test_scores_do_not_depend_on_the_batch_size(make: Callable[[], nn.Module], criterion: str) -> None:
    """One image at a time, all at once or an uneven last batch: the same scores and means, also where the
    batch is not the first axis of what is read."""
    groups, images = groups_of(seeded(make)), pictures(7)
    whole = scoring_of(groups, images, 7, replacement="linear")
    wanted = score(criterion, whole)
    for size in (1, 3):
        parts = scoring_of(groups, images, size, replacement="linear")
        np.testing.assert_allclose(
            score(criterion, parts)[1:], wanted[1:], rtol=1e-4, atol=1e-5 * wanted.max()
        )
        for weight, wanted_statistics in whole.statistics.items():
            found = parts.statistics[weight]
            torch.testing.assert_close(found.mean, wanted_statistics.mean, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.covariance, wanted_statistics.covariance, rtol=1e-4, atol=1e-5)


@wirings
def test_means_are_what_the_readers_see(make: Callable[[], nn.Module]) -> None:
    """The mean of each weight's input over images and positions, by another run of the traced graph: with the
    readings of a criterion, and in a pass of their own for one that reads nothing. Pictures lose no channel."""
    groups, images = groups_of(seeded(make)), pictures(5)
    alone, together = (scoring_of(groups, images, 2, replacement="mean") for _ in range(2))
    score("taylor", together)
    seen: dict[str, Tensor] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            for reader in groups.readers:
                pictures_read = reader.tensor.op == "placeholder"
                if reader.node is n and reader.foldable and reader.weight and not pictures_read:
                    value = self.env[reader.tensor].movedim(reader.dim, 0)
                    seen[reader.weight] = value.flatten(1).mean(1)
            return super().run_node(n)

    with torch.no_grad():
        Watch(groups.network).run(images)
    for statistics in (alone.statistics, together.statistics):
        assert statistics.keys() == seen.keys() != set()
        for weight, found in statistics.items():
            torch.testing.assert_close(found.mean.float(), seen[weight], rtol=1e-4, atol=1e-5)


def test_a_head_used_twice_counts_both_uses() -> None:
    """Of a shared module the estimates of all uses add up, signed, whatever the sizes they are used at."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head, self.z = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.a(x))
            levels = [x, -0.5 * nn.functional.avg_pool2d(x, 2)]
            return torch.cat([self.z(torch.tanh(self.head(level))).flatten(1) for level in levels], 1)

    groups, images = groups_of(seeded(Shared)), pictures(3)
    scoring = scoring_of(groups, images, 3, replacement="linear")
    wanted = finite_difference(groups, images, scoring.statistics)
    np.testing.assert_allclose(
        scoring.first_order(per_position=False)[:, 1:], wanted[:, 1:], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("poison", ["a.weight", "z.bias", "norm.running_var"])
@pytest.mark.parametrize("criterion", ["taylor", "taylor-weight"])
def test_what_is_not_finite_stops_and_names_the_layer(poison: str, criterion: str) -> None:
    """A NaN weight, an infinite bias or statistic: the error names where it is, not where it ends up."""
    module = seeded(lambda: Chain(batch_norm=True))
    with torch.no_grad():
        dict([*module.named_parameters(), *module.named_buffers()])[poison].view(-1)[0] = (
            float("nan") if poison == "a.weight" else float("inf") if poison == "z.bias" else -1.0
        )
    layer = poison.split(".", maxsplit=1)[0]
    with pytest.raises(ImportanceError, match=rf"^{layer}\b"):
        score(criterion, scoring_of(groups_of(module), pictures(2)))


def test_a_gradient_that_is_not_finite_names_its_reader() -> None:
    """Finite activations with an infinite gradient (a square root at zero)."""

    class Root(Loss):
        def loss(self, raw: Tensor, targets: object) -> Tensor:
            return (raw * 0).sqrt().flatten(1).sum(1)

    scoring = Scoring(groups_of(seeded(Chain)), Root(), batches(pictures(2)))  # type: ignore[arg-type]
    with pytest.raises(ImportanceError, match=r"^z: the gradient"):
        score("taylor", scoring)


@pytest.mark.parametrize("criterion", ["magnitude", "magnitude-l1", "geometric-median"])
def test_weights_that_are_not_finite_stop_too(criterion: str) -> None:
    """Criteria that look at no image name the layer as well (torch-pruning passes NaN scores on)."""
    module = seeded(Residual)
    with torch.no_grad():
        module.get_parameter("b.weight")[2, 0, 0, 0] = float("nan")
    with pytest.raises(ImportanceError, match=r"a, b, c: .*nan"):
        score(criterion, scoring_of(groups_of(module), pictures(2)))


def group_by_hand(groups: Groups, *layers: str) -> list[np.ndarray]:
    return [groups.channels(layer) for layer in layers]


@pytest.mark.parametrize(("criterion", "power"), [("magnitude", 2), ("magnitude-l1", 1)])
def test_magnitude_is_the_norm_of_the_weights(criterion: str, power: int) -> None:
    """torch.linalg norms of the rows that make each coupled channel, over all of its layers."""
    module = seeded(Residual)
    groups = groups_of(module)
    scores = score(criterion, scoring_of(groups, pictures(1)))
    rows = torch.cat([module.get_parameter(f"{name}.weight").detach().flatten(1) for name in "abc"], 1)
    wanted = torch.linalg.vector_norm(rows, power, dim=1)
    np.testing.assert_allclose(scores[groups.channels("a")], wanted / wanted.norm(), rtol=1e-5)
    for layer in "bc":
        np.testing.assert_array_equal(groups.channels(layer), groups.channels("a"))


def test_geometric_median_by_brute_force() -> None:
    """The sum of distances to every other row, pair by pair, over the layers of the group."""
    module = seeded(Residual)
    groups = groups_of(module)
    scores = score("geometric-median", scoring_of(groups, pictures(1)))
    wanted = torch.zeros(6, dtype=torch.float64)
    for name in "abc":
        rows = module.get_parameter(f"{name}.weight").detach().double().flatten(1)
        for i in range(6):
            wanted[i] += sum((rows[i] - rows[j]).square().sum().sqrt() for j in range(6))
    np.testing.assert_allclose(scores[groups.channels("a")], wanted / wanted.norm(), rtol=1e-6)


def test_geometric_median_takes_grouped_layers() -> None:
    """Grouped, depth multiplier 2 and transposed grouped convolutions have scores (torch-pruning crashes)."""

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.g = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2)
            self.twice, self.t = nn.Conv2d(8, 16, 3, groups=8), nn.ConvTranspose2d(16, 8, 2, 2, groups=4)
            self.z = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.z(self.t(self.twice(self.g(self.a(x)))))

    groups = groups_of(seeded(Grouped))
    scores = score("geometric-median", scoring_of(groups, pictures(1)))
    assert groups.units >= 8
    assert (scores[1:] > 0).all()


def test_batchnorm_is_the_sum_of_scales() -> None:
    """|scale| of the unit's batch norm; channels without one are refused by name instead of scoring 0."""
    module = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1))
    )
    with torch.no_grad():
        module[1].weight[1] *= -1
    groups = groups_of(module)
    scores = score("batchnorm", scoring_of(groups, pictures(1)))
    np.testing.assert_allclose(scores[groups.channels("0")], module[1].weight.detach().abs(), rtol=1e-6)
    with pytest.raises(ImportanceError, match=r"channels of b pass no batch norm"):
        score("batchnorm", scoring_of(groups_of(seeded(lambda: Chain(batch_norm=True))), pictures(1)))
    protected = groups_of(seeded(lambda: Chain(batch_norm=True))).protect(["b"])
    assert score("batchnorm", scoring_of(protected, pictures(1)))[protected.channels("a")].min() > 0


def test_taylor_weight_by_hand() -> None:
    """(sum of weight x gradient over row, bias, scale and shift)^2 of each example, then their mean."""
    module = seeded(lambda: Chain(batch_norm=True))
    images = pictures(5)
    groups = groups_of(module)
    scores = score("taylor-weight", scoring_of(groups, images, 3))
    wanted = torch.zeros(6, dtype=torch.float64)
    for image in images:
        module.zero_grad()
        torch.autograd.backward(Loss().loss(module(image[None]), []).sum())
        change = torch.zeros(6, dtype=torch.float64)
        for name in ("a.weight", "a.bias", "norm.weight", "norm.bias"):
            parameter = module.get_parameter(name)
            assert parameter.grad is not None
            change += (
                (parameter * parameter.grad)
                .detach()
                .double()
                .flatten(1 if parameter.dim() > 1 else 0)
                .reshape(6, -1)
                .sum(1)
            )
        wanted += change**2 / len(images)
    np.testing.assert_allclose(scores[groups.channels("a")], wanted, rtol=1e-4)


def test_random_is_seeded() -> None:
    """The same seed gives the same scores, another seed others."""
    groups = groups_of(seeded(Chain))
    one, again, other = (score("random", scoring_of(groups, pictures(1), seed=seed)) for seed in (1, 1, 2))
    assert (one == again).all()
    assert (one != other).any()


@given(st.lists(st.floats(0, 1e6), min_size=12, max_size=12))
@settings(deadline=None, max_examples=30)
def test_layers_have_unit_norm(values: list[float]) -> None:
    """After normalisation each group has L2 norm 1, or is all zero."""
    groups = CHAIN
    scores = by_layer(groups, np.array(values[: groups.units + 1]))
    for group in groups.groups:
        norm = np.linalg.norm(scores[list(group.units)])
        assert norm == pytest.approx(1) or norm == 0


CHAIN = groups_of(seeded(Chain))


@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {"batchnorm"}))
def test_the_network_is_left_as_it_was(criterion: str) -> None:
    """Mode, requires_grad and weights are as before (torch-pruning leaves eval), also after an error."""
    network = groups_of(seeded(Chain)).network
    network.train()
    network.get_parameter("a.weight").requires_grad_(False)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in network.named_parameters()}
    groups = find_groups(network)
    score(criterion, scoring_of(groups, pictures(2), replacement="linear"))
    broken = scoring_of(groups, pictures(2) * float("nan"), replacement="linear")
    if criterion.startswith("taylor"):
        with pytest.raises(ImportanceError, match="NaN"):
            score(criterion, broken)
    assert network.training
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert parameter.grad is None
        assert torch.equal(parameter, before[name][1])


def test_scoring_keeps_nothing_of_a_pass() -> None:
    """Scoring again and again keeps no more tensors alive (a tap that leads back to its graph is never freed)."""

    def alive() -> int:
        scoring = scoring_of(CHAIN, pictures(4), replacement="linear")
        score("taylor", scoring)
        del scoring
        gc.collect()
        return sum(isinstance(found, Tensor) for found in gc.get_objects())

    alive()
    before = alive()
    assert [alive() for _ in range(3)] == [before] * 3


def test_frozen_layers_score_like_others() -> None:
    """requires_grad off changes no score (torch-pruning silently leaves frozen layers out)."""
    free, frozen = groups_of(seeded(Chain)), groups_of(seeded(Chain).requires_grad_(False))
    for criterion in ("taylor", "taylor-weight", "magnitude"):
        scores = [score(criterion, scoring_of(groups, pictures(2))) for groups in (free, frozen)]
        np.testing.assert_array_equal(*scores)
        assert (scores[1][1:] > 0).all()


def test_a_function_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`file.py:function` and `module:function` are called with the Scoring; what cannot serve is refused."""
    file = tmp_path / "own_criterion.py"
    file.write_text(
        "import numpy as np\n"
        "def rising(scoring): return np.arange(scoring.groups.units + 1.0)\n"
        "def short(scoring): return np.zeros(2)\n"
        "def falling(scoring): return -rising(scoring)\n"
        "text = 'x'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    scoring = scoring_of(CHAIN, pictures(1))
    for place in (str(file), "own_criterion"):
        assert score(f"{place}:rising", scoring).tolist() == list(range(CHAIN.units + 1))
    for name, reason in (
        (f"{file}:short", "one score a unit"),
        (f"{file}:falling", r"^a: .* -1\.0"),
        (f"{file}:text", "no function"),
        (f"{file}:none", "none"),
        (f"{tmp_path / 'none.py'}:rising", "cannot be loaded"),
        ("no.such.module:rising", "cannot be loaded"),
        ("tailor", "known: taylor"),
    ):
        with pytest.raises(ImportanceError, match=reason):
            score(name, scoring)
    broken = tmp_path / "broken.py"
    broken.write_text("def f(:\n")
    with pytest.raises(ImportanceError, match="SyntaxError"):
        find_criterion(f"{broken}:f")


def test_no_image_is_an_error() -> None:
    """Scoring without a single image says so."""
    for criterion in ("taylor", "taylor-weight"):
        with pytest.raises(ImportanceError, match="no image"):
            score(criterion, scoring_of(CHAIN, pictures(0)))


def test_two_processes_score_as_one(tmp_path: Path) -> None:
    """Under torchrun (gloo) both processes get the scores and means of one, also where one has no image; they end
    without a thread of the group left, which could take the process with it (SIGABRT)."""
    script = str(Path(__file__).with_name("score_in_processes.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    for arguments in ((script, str(tmp_path / "one")), (*launcher, script, str(tmp_path / "two"))):
        finished = subprocess.run(
            (sys.executable, *arguments), env=environment, capture_output=True, text=True, check=False
        )
        assert finished.returncode == 0, finished.stderr
    one = json.loads((tmp_path / "one-0.json").read_text())
    assert len(one) == 2 * 2 * 4
    for rank in (0, 1):
        two = json.loads((tmp_path / f"two-{rank}.json").read_text())
        assert two.keys() == one.keys()
        for key, values in one.items():
            np.testing.assert_allclose(two[key], values, rtol=1e-5, atol=1e-7, err_msg=key)


@pytest.mark.shared_data
def test_taylor_agrees_with_the_truth(shared: Path) -> None:
    """On NanoDet-g at 320, 186 channels of all layers: Spearman's correlation of the default importance with
    the mean over images of |change of the loss| when the channel is zeroed is at least 0.7."""
    dataset = load_dataset(
        shared / "coco-person" / "person_train2017.json", shared / "coco-person" / "train2017"
    )
    with_boxes = [i for i, sample in enumerate(dataset.samples) if not sample.ignore.all()]
    chosen = np.random.default_rng(0).choice(with_boxes, IMAGES, replace=False)
    detector = load_detector("nanodet-g", shared / "nanodet-g" / "nanodet_g_coco80_convs.npz", (320, 320))
    canvases = Canvases(dataset.subset(sorted(int(i) for i in chosen)), (320, 320), detector.preprocessing)
    found = [
        (batch.images, batch.targets) for batch in image_batches(canvases, batch_size=8, augmentation=None)
    ]
    groups = find_groups(trace(detector, torch.zeros(1, 3, 320, 320)).eval())
    scoring = Scoring(groups, detector, lambda: found)
    order = np.random.default_rng(1)
    share = 160 / groups.units
    sample = [
        int(u)
        for g in groups.groups
        for u in order.permutation(g.units)[: max(4, round(share * len(g.units)))]
    ]
    assert len(sample) >= 150
    truth = zeroing(groups, detector, found, sample)
    layer = {unit: index for index, group in enumerate(groups.groups) for unit in group.units}
    print(
        f"\n{len(sample)} channels of {len(groups.groups)} groups, {IMAGES} images: "
        "Spearman overall / mean within groups"
    )
    results = {}
    raw_mean = np.abs(scoring.first_order(per_position=True)).mean(0)
    for name, scores in {
        **{name: score(name, scoring) for name in ("taylor", "taylor-sum", "taylor-weight", "magnitude")},
        "taylor, not normalised": raw_mean,
    }.items():
        within = []
        for index in set(layer[u] for u in sample):
            units = [position for position, unit in enumerate(sample) if layer[unit] == index]
            within.append(spearmanr(scores[[sample[p] for p in units]], truth[units]).statistic)
        results[name] = spearmanr(scores[sample], truth).statistic
        print(f"  {name:24} {results[name]:6.3f} {np.mean(within):6.3f}")
    assert results[DEFAULT] >= 0.7


IMAGES = 16
DEFAULT = PruningOptions().criterion


def zeroing(
    groups: Groups, detector: nn.Module, found: list[tuple[Tensor, list[Targets]]], units: list[int]
) -> np.ndarray:
    """Mean over images of |change of the loss| when each of `units` alone is zeroed where it is read.

    Only what follows the zeros is computed again.
    """
    changes = np.zeros(len(units))
    with torch.no_grad():
        for images, targets in found:
            whole = torch.fx.Interpreter(groups.network, garbage_collect_values=False)
            before = detector.loss(whole.run(images), targets)
            known = {node.name: value for node, value in whole.env.items()}
            for position, unit in enumerate(units):
                network = masked(groups, [unit])
                new = {node for node in network.graph.nodes if str(node.target).startswith("matrix_")}
                for node in network.graph.nodes:
                    if node.op == "output" or not new.isdisjoint(node.all_input_nodes):
                        new.add(node)
                same = {n: known[n.name] for n in network.graph.nodes if n not in new and n.name in known}
                after = detector.loss(torch.fx.Interpreter(network).run(images, initial_env=same), targets)
                changes[position] += (after - before).abs().sum().item()
    return changes / sum(len(images) for images, _ in found)
