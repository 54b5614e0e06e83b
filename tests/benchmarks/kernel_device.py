"""A device whose kernels cost what a test says: it reads ONNX files, and answers as a session does.

A convolution costs overhead + positions x kernel x in x out with both counts raised to their steps; in counts
off the alignment take another kernel, slower and without steps; depthwise ones have a fast kernel for multiples
of the step alone. All else costs by the elements it writes.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from simulated import engine

from edgeprune.data.files import sha256_of
from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.deploy.records import DeviceInfo, Engine, Latencies, LatencyBlock, Profile
from edgeprune.deploy.targets import load_target
from edgeprune.pruning.footprint import footprint
from edgeprune.pruning.graph import Network
from edgeprune.pruning.latency import layer_uses
from edgeprune.pruning.memory import Footprint, MemoryModel

IN_STEP, ALIGNMENT, OUT_STEP = 16, 4, 8
OVERHEAD_MS = 0.01
MS_PER_MAC = 2e-9 * 10
UNALIGNED = 1.7
DEPTHWISE_COST = 60  # of a multiply-add there: memory-bound
MS_PER_ELEMENT = 0.4e-6 * 10
FIXED_MS = 0.3  # of a whole network, what no channel changes
IN_NETWORK = 1.1  # a kernel takes longer there than alone


def kernel_ms(positions: int, kernel: int, ins: int, outs: int) -> float:
    """The true cost; `ins` is 1 for depthwise kernels."""
    if ins == 1:
        slower = UNALIGNED if outs % OUT_STEP else 1.0
        return OVERHEAD_MS + DEPTHWISE_COST * slower * MS_PER_MAC * positions * kernel * outs
    if ins % ALIGNMENT and ins > 3:
        return OVERHEAD_MS + UNALIGNED * MS_PER_MAC * positions * kernel * ins * outs
    padded = ins if ins <= 3 else -(-ins // IN_STEP) * IN_STEP
    return OVERHEAD_MS + MS_PER_MAC * positions * kernel * padded * -(-outs // OUT_STEP) * OUT_STEP


class KernelDevice:
    """
    Args:
        slowdown: call number -> factor on all times of that call.
        noise: of each run, log-normal; single runs also take three times as long, now and then.
        fails_at: the number of the profile that raises KeyboardInterrupt.
        memory: what the engines of whole networks hold; None: it does not tell.
    """

    def __init__(
        self,
        slowdown: Callable[[int], float] = lambda call: 1.0,
        noise: float = 0.0,
        fails_at: int | None = None,
        telemetry: Callable[[float], Mapping[str, Any]] = lambda time_s: {},
        memory: MemoryModel | None = None,
        lock_clocks: bool = False,
    ) -> None:
        self.target = load_target("host")
        self.power_mode = None
        self.power = {"mode": None, "lock_clocks": lock_clocks}
        self.profiles = self.benchmarks = 0
        self.probed: list[tuple[int, int]] = []  # (in, out) of every probe that was timed, once a file
        self._slowdown, self._noise, self._fails_at, self._telemetry = slowdown, noise, fails_at, telemetry
        self._memory = memory
        self._random = random.Random(0)
        self._models: dict[str, onnx.ModelProto] = {}

    def probe(self) -> DeviceInfo:
        return DeviceInfo(
            target="host",
            transport="a test",
            board="simulated",
            machine="x86_64",
            system="Linux",
            python="3.11",
            l4t=None,
            cpus=1,
            memory_mib={},
            temperatures_c={},
            images="cv2",
            backend="onnxruntime",
            backends={"onnxruntime": {"version": "1"}},
        )

    def build(self, model: Path, precision: str, options: Mapping[str, Any]) -> Engine:
        content = onnx.load(model)
        key = sha256_of(model)
        self._models[key] = content
        if content.graph.name == "probes":
            weights = _weights(content)
            named = [node for node in content.graph.node if node.op_type == "Conv"]
            self.probed += [
                (weights[n.input[1]][1], weights[n.input[1]][0]) for n in named if n.name.startswith("probe")
            ]
        held = content.graph.doc_string and Footprint(**json.loads(content.graph.doc_string))
        memory_mib = self._memory.predict_mib(held) if self._memory and held else None
        return Engine(**{**engine(0).__dict__, "key": key, "memory_mib": memory_mib})

    def profile(self, engine: Engine, image: Path, preprocessing: Preprocessing, *, runs: int) -> Profile:
        self.profiles += 1
        if self.profiles == self._fails_at:
            raise KeyboardInterrupt
        factor = self._slowdown(self.profiles)
        times = _times(self._models[engine.key])
        return Profile(
            {name: tuple(self._run(ms) * factor for _ in range(runs)) for name, ms in times.items()}
        )

    def _run(self, ms: float) -> float:
        outlier = 3.0 if self._noise and self._random.random() < 0.05 else 1.0
        return ms * outlier * self._random.lognormvariate(0, self._noise)

    def benchmark(
        self,
        engines: Sequence[Engine],
        images: Sequence[Path],
        preprocessing: Preprocessing,
        *,
        runs: int,
        block_runs: int,
        seed: int,
        scopes: Sequence[str],
    ) -> Latencies:
        self.benchmarks += 1
        blocks, now_s = [], 0.0
        for number in range(runs // block_runs):
            for index, each in enumerate(engines):
                ms = sum(_times(self._models[each.key]).values())
                samples = tuple(self._run(ms) for _ in range(block_runs))
                blocks.append(
                    LatencyBlock(index, number, now_s, now_s + sum(samples) / 1e3, {"engine": samples})
                )
                now_s += sum(samples) / 1e3
        seconds = [{"time_s": float(second), **self._telemetry(second)} for second in range(int(now_s) + 2)]
        around = {"before": {"power_mode": None}, "after": {"power_mode": None}, "samples": seconds}
        return Latencies(tuple(each.key for each in engines), tuple(blocks), (1,) * len(engines), 0.0, around)


def export(network: Network, path: Path) -> None:
    """A whole network as the device reads it: named convolutions with weights of their shapes, and what each
    costs where the file cannot say it."""
    nodes, weights, inputs = [], [], []
    rest_ms = FIXED_MS
    for use in layer_uses(network):
        if not use.kind.measured:
            rest_ms += MS_PER_ELEMENT * use.in_channels * int(np.prod(use.kind.input))
            continue
        shape = (use.out_channels, 1 if use.kind.one_axis else use.in_channels, *use.kind.kernel)
        weights.append(numpy_helper.from_array(np.zeros(shape, np.float32), f"{use.layer}.weight"))
        nodes.append(
            helper.make_node(
                "Conv",
                ["images", f"{use.layer}.weight"],
                [f"{use.layer}/written"],
                name=use.layer,
                strides=use.kind.stride,
                doc_string=json.dumps(use.kind.input),
            )
        )
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, (1, 3, 4, 4))]
    nodes.append(helper.make_node("Identity", ["images"], ["rest"], name="rest", doc_string=str(rest_ms)))
    held = json.dumps(asdict(footprint(network, OUT_STEP)))
    graph = helper.make_graph(nodes, "network", inputs, [], weights, doc_string=held)
    onnx.save(helper.make_model(graph), path)


def _weights(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


def _times(model: onnx.ModelProto) -> dict[str, float]:
    """True time of every kernel, by a name as ONNX Runtime gives it."""
    weights = _weights(model)
    probes = model.graph.name == "probes"
    own = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim][2:]
    found = {}
    for node in model.graph.node:
        if node.op_type == "Conv" and len(weights[node.input[1]]) == 4:
            outs, ins, *kernel = weights[node.input[1]]
            size = json.loads(node.doc_string) if not probes else own
            size = [40, 40] if node.name.startswith("reference") else size
            strides = (
                next(a.ints for a in node.attribute if a.name == "strides") if node.attribute else (1, 1)
            )
            positions = int(np.prod([-(-side // s) for side, s in zip(size, strides, strict=True)]))
            ms = kernel_ms(positions, int(np.prod(kernel)), ins, outs)
            found[f"{node.output[0]}_nchwc"] = ms * (1.0 if probes else IN_NETWORK)
        elif node.name == "rest":
            found["rest"] = float(node.doc_string)
    return found
