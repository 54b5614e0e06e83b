"""TensorRT 8.2 to 11 with pycuda.

The versions differ in few places, and each difference is asked for by name: `hasattr` where an engine is
built, and one of two run adapters, bindings (8.2 to 8.4) or named tensors (8.5 and later). From TensorRT 11
on a network is strongly typed: reduced precision must be in the ONNX file.
"""

import os
import stat
import time
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from . import trtexec
from .backend import Backend, Detections, Log, Runner
from .errors import AgentError
from .files import disk_error
from .system import board, memory_mib

try:
    import tensorrt as trt
except ImportError as error:
    raise AgentError(
        "backend",
        "TensorRT cannot be imported: {}".format(error),
        "use the system's python3, which has JetPack's TensorRT (sudo apt-get install python3-libnvinfer)",
    ) from error

MIB = 1 << 20
WORKSPACE_SHARE = 8  # of the free memory: 256 to 300 MiB on a Nano, as its users advise
SMALLEST_WORKSPACE_MIB = 64
IN_FLIGHT = 2  # images: while the GPU works on one, the other is copied
NO_INT8 = ((5, 3), (6, 2))  # compute capabilities of Nano and TX2
DRIVER_REMEDY = "check the NVIDIA driver: on a Jetson, JetPack must be installed and no update be half done"


def cuda_driver() -> Any:
    """Import pycuda's driver module and initialise CUDA.

    Raises:
        AgentError: If pycuda is not there, or finds no GPU.
    """
    try:
        import pycuda.driver as cuda
    except ImportError as error:
        raise AgentError(
            "pycuda",
            "pycuda cannot be imported: {}".format(error),
            "install it with nvcc on the PATH: export PATH=/usr/local/cuda/bin:$PATH; "
            "python3 -m pip install --user pycuda",
        ) from error
    try:
        cuda.init()
    except cuda.Error as error:
        raise AgentError("driver", "CUDA does not start: {}".format(error), DRIVER_REMEDY) from error
    return cuda


class TensorRt(Backend):
    name = "tensorrt"

    def probe(self) -> Dict[str, Any]:
        cuda = cuda_driver()
        device = cuda.Device(0)
        capability: Tuple[int, int] = device.compute_capability()
        return {
            "version": trt.__version__,
            "compute_capability": "{}.{}".format(*capability),
            "gpu": device.name(),
            "gpu_memory_mib": device.total_memory() // MIB,
            "trtexec": trtexec.program(),
        }

    def build(self, model: str, engine: str, precision: str, options: Dict[str, Any], log: Log) -> None:
        """Write the engine of a model.

        `options`, all optional: "workspace_mib"; "batch" [min, opt, max] for a model whose batch is free;
        "optimization_level" 0 to 5, from 8.6; "dla_core", with the GPU for what the DLA cannot do; "via"
        "trtexec".
        """
        capability = cuda_driver().Device(0).compute_capability()
        if precision == "int8" and tuple(capability) in NO_INT8:
            message = "compute capability {}.{} has no int8 in hardware".format(*capability)
            raise AgentError("precision", message, "use fp16")
        if options.get("via") == "trtexec":
            trtexec.build(trt.__version__, model, engine, precision, options, _workspace_mib(options), log)
            return
        workspace_mib = _workspace_mib(options)
        printed = _Printed()
        try:
            plan = _build(model, precision, options, workspace_mib, log)
            if plan is None and printed.says("memory") and workspace_mib > SMALLEST_WORKSPACE_MIB:
                log(
                    "out of memory with a workspace of {} MiB; tried again with a quarter".format(
                        workspace_mib
                    )
                )
                plan = _build(model, precision, options, max(workspace_mib // 4, SMALLEST_WORKSPACE_MIB), log)
        finally:
            for line in printed.lines():
                log(line)
        if plan is None:
            reason = printed.reason() or "it gave no reason"
            raise AgentError("build", "TensorRT {} built no engine: {}".format(trt.__version__, reason))
        try:
            with open(engine, "wb") as file:
                file.write(plan)
        except OSError as error:
            raise disk_error(error, engine) from error

    def load(self, engine: str, options: Dict[str, Any]) -> Runner:
        return TensorRtRunner(engine, options)

    def memory_mib(self, engine: str, options: Dict[str, Any]) -> Optional[float]:
        """The plan, which is weights in the main, and what an execution context works in."""
        loaded = _deserialised(engine, options, _logger())
        if loaded is None:
            return None
        newer = hasattr(loaded, "device_memory_size_v2")  # 10 has both, 11 this one alone
        working = loaded.device_memory_size_v2 if newer else loaded.device_memory_size
        return float((os.path.getsize(engine) + working) / MIB)


BACKEND = TensorRt()


def _workspace_mib(options: Dict[str, Any]) -> int:
    available = memory_mib()["available"] or 0
    return int(options.get("workspace_mib") or max(available // WORKSPACE_SHARE, SMALLEST_WORKSPACE_MIB))


def _logger() -> Any:
    """TensorRT's own logger: it prints warnings and errors to standard error, which is our log file.

    A logger in Python is not to be had in 8.2, and only the first one of a process is used anyway.
    """
    return trt.Logger()


def _builder(logger: Any) -> Any:
    try:
        return trt.Builder(logger)
    except TypeError as error:  # "pybind11::init(): factory function returned nullptr"
        raise AgentError(
            "driver", "TensorRT finds no working GPU: {}".format(error), DRIVER_REMEDY
        ) from error


def _build(model: str, precision: str, options: Dict[str, Any], workspace_mib: int, log: Log) -> Any:
    """Return the serialised engine, None where TensorRT gives none."""
    logger = _logger()
    builder = _builder(logger)
    creation = trt.NetworkDefinitionCreationFlag
    network = builder.create_network(
        1 << int(creation.EXPLICIT_BATCH) if hasattr(creation, "EXPLICIT_BATCH") else 0
    )
    parser = trt.OnnxParser(network, logger)
    _parse(parser, network, model)

    config = builder.create_builder_config()
    if hasattr(config, "set_memory_pool_limit"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib * MIB)
    else:
        config.max_workspace_size = workspace_mib * MIB
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layer names and shapes for the profile
    _set_precision(builder, network, config, precision)
    _set_profile(builder, network, config, options.get("batch", [1, 1, 1]))
    if options.get("optimization_level") is not None:
        if hasattr(config, "builder_optimization_level"):
            config.builder_optimization_level = options["optimization_level"]
        else:
            log("TensorRT {} has no optimisation levels: left out".format(trt.__version__))
    if options.get("dla_core") is not None:
        _use_dla(builder, config, precision, options["dla_core"])
    cache = _TimingCache(config)
    plan = builder.build_serialized_network(network, config)
    if plan is not None:
        cache.save()
    return plan


def _parse(parser: Any, network: Any, model: str) -> None:
    with open(model, "rb") as file:
        understood = parser.parse(file.read())
    if not understood:
        errors = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        message = "TensorRT {} does not take the model: {}".format(trt.__version__, "; ".join(errors))
        raise AgentError("model", message, "see `edgeprune export` for the operators that it knows")
    names = {network.get_output(index).name for index in range(network.num_outputs)}
    if network.num_inputs != 1 or not {"boxes", "scores"} <= names:
        # An empty file parses "successfully" and has no outputs.
        raise AgentError(
            "model",
            "the model needs one input and the outputs boxes and scores; it has {}".format(sorted(names)),
        )


def _parser_error(error: Any) -> str:
    where = "node {}".format(error.node())
    if hasattr(error, "node_operator"):
        where += " ({} {})".format(error.node_operator(), error.node_name())
    return "{}: {} ({})".format(where, error.desc(), error.code())


def _set_precision(builder: Any, network: Any, config: Any, precision: str) -> None:
    flags = trt.BuilderFlag
    if precision == "int8" and not _has_type(network, trt.DataType.INT8):
        raise AgentError(
            "precision",
            "int8 needs a model with explicit quantisation (Q/DQ)",
            "export it with --precision int8",
        )
    if precision == "fp32":
        return
    if not hasattr(flags, "FP16"):  # strongly typed
        if precision == "fp16" and not _has_type(network, trt.DataType.HALF):
            message = "TensorRT {} takes the precision from the model, and this one is fp32".format(
                trt.__version__
            )
            raise AgentError("precision", message, "export it with float16 types")
        return
    if not builder.platform_has_fast_fp16:
        raise AgentError("precision", "this GPU has no fast fp16", "use fp32")
    config.set_flag(flags.FP16)
    if precision == "int8":
        config.set_flag(flags.INT8)


def _has_type(network: Any, wanted: Any) -> bool:
    """Whether any layer of the network gives values of a type."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for output in range(layer.num_outputs):
            if layer.get_output(output).dtype == wanted:
                return True
    return False


def _set_profile(builder: Any, network: Any, config: Any, batch: List[int]) -> None:
    """Give a model whose batch is free the range of its batches."""
    images = network.get_input(0)
    shape = tuple(images.shape)
    if shape[0] >= 0:
        return
    profile = builder.create_optimization_profile()
    profile.set_shape(images.name, *[(count,) + shape[1:] for count in batch])
    config.add_optimization_profile(profile)


def _use_dla(builder: Any, config: Any, precision: str, core: int) -> None:
    if not 0 <= core < builder.num_DLA_cores:
        raise AgentError(
            "dla", "core {} of the DLA was asked for; this device has {}".format(core, builder.num_DLA_cores)
        )
    if precision == "fp32":
        raise AgentError("dla", "the DLA runs fp16 and int8 only", "add --precision fp16")
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)


class _TimingCache:
    """Measured kernel times of earlier builds on this device, kept beside the engines for later ones."""

    def __init__(self, config: Any) -> None:
        self._config = config
        device = "".join(letter if letter.isalnum() else "-" for letter in board())
        self._path = os.path.join("engines", "timing-{}-{}.cache".format(device, trt.__version__))
        if not self._use(self._read()):  # damaged, or of another device
            self._use(b"")

    def _read(self) -> bytes:
        if not os.path.isfile(self._path):
            return b""
        with open(self._path, "rb") as file:
            return file.read()

    def _use(self, content: bytes) -> bool:
        cache = self._config.create_timing_cache(content)
        return bool(cache is not None and self._config.set_timing_cache(cache, False))

    def save(self) -> None:
        cache = self._config.get_timing_cache()
        if cache is None:
            return
        temporary = "{}.{}.tmp".format(self._path, os.getpid())
        with open(temporary, "wb") as file:
            file.write(cache.serialize())
        os.replace(temporary, self._path)


class _Printed:
    """What TensorRT prints on standard error, our log file, from now on."""

    def __init__(self) -> None:
        self._start = os.fstat(2).st_size

    def lines(self) -> List[str]:
        """Warnings and errors; nothing where standard error is no file."""
        if not stat.S_ISREG(os.fstat(2).st_mode):
            return []
        with open("/proc/self/fd/2", "rb") as file:
            file.seek(self._start)
            text = file.read().decode("utf-8", "replace")
        return [line.strip() for line in text.splitlines() if "[TRT]" in line or "ERROR" in line]

    def reason(self) -> str:
        """The last errors, in one line."""
        errors = [line for line in self.lines() if "[E]" in line or "ERROR" in line]
        return "; ".join(errors[-2:])

    def says(self, word: str) -> bool:
        return word in self.reason().lower()


def _numpy_types() -> Dict[Any, Any]:
    """numpy's types by TensorRT's; `trt.nptype` breaks with numpy 1.24 and later in TensorRT 8.2 and 8.5."""
    types = trt.DataType
    found = {
        types.FLOAT: np.float32,
        types.HALF: np.float16,
        types.INT32: np.int32,
        types.INT8: np.int8,
        types.BOOL: np.bool_,
    }
    if hasattr(types, "UINT8"):
        found[types.UINT8] = np.uint8
    return found


class _Tensor:
    """An input or output of an engine: its memory on the GPU and page-locked here."""

    def __init__(self, cuda: Any, name: str, is_input: bool, shape: Tuple[int, ...], dtype: Any) -> None:
        self.name = name
        self.is_input = is_input
        self.shape = shape
        self.host = cuda.pagelocked_empty(shape, dtype)
        self.device = cuda.mem_alloc(self.host.nbytes)


class _Bindings:
    """The run adapter of TensorRT 8.2 to 8.4: tensors by number."""

    def __init__(self, engine: Any, context: Any) -> None:
        self._engine = engine
        self._context = context
        self._addresses: List[int] = []

    def names(self) -> List[str]:
        return [self._engine.get_binding_name(index) for index in range(self._engine.num_bindings)]

    def is_input(self, name: str) -> bool:
        return bool(self._engine.binding_is_input(self._engine.get_binding_index(name)))

    def dtype(self, name: str) -> Any:
        return self._engine.get_binding_dtype(self._engine.get_binding_index(name))

    def shape(self, name: str) -> Tuple[int, ...]:
        return tuple(self._context.get_binding_shape(self._engine.get_binding_index(name)))

    def set_shape(self, name: str, shape: Tuple[int, ...]) -> None:
        self._context.set_binding_shape(self._engine.get_binding_index(name), shape)

    def set_addresses(self, tensors: List[_Tensor]) -> None:
        self._addresses = [int(tensor.device) for tensor in tensors]

    def enqueue(self, stream: int) -> bool:
        return bool(self._context.execute_async_v2(self._addresses, stream))


class _NamedTensors:
    """The run adapter of TensorRT 8.5 and later: tensors by name."""

    def __init__(self, engine: Any, context: Any) -> None:
        self._engine = engine
        self._context = context

    def names(self) -> List[str]:
        return [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]

    def is_input(self, name: str) -> bool:
        return bool(self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT)

    def dtype(self, name: str) -> Any:
        return self._engine.get_tensor_dtype(name)

    def shape(self, name: str) -> Tuple[int, ...]:
        return tuple(self._context.get_tensor_shape(name))

    def set_shape(self, name: str, shape: Tuple[int, ...]) -> None:
        self._context.set_input_shape(name, shape)

    def set_addresses(self, tensors: List[_Tensor]) -> None:
        for tensor in tensors:
            self._context.set_tensor_address(tensor.name, int(tensor.device))

    def enqueue(self, stream: int) -> bool:
        return bool(self._context.execute_async_v3(stream))


class _Context:
    """The process's one CUDA context: memory of engines that are timed together belongs to the same one."""

    context: Any = None
    users = 0

    @classmethod
    def enter(cls, cuda: Any) -> None:
        if cls.users == 0:
            cls.context = cuda.Device(0).make_context()
        cls.users += 1

    @classmethod
    def leave(cls) -> None:
        cls.users -= 1
        if cls.users == 0:
            cls.context.pop()
            cls.context.detach()


class _Lane:
    """One image in flight: an execution context with tensors and a stream of its own."""

    def __init__(self, cuda: Any, engine: Any, context: Any, options: Dict[str, Any]) -> None:
        self._cuda = cuda
        self.context = context
        adapter = _NamedTensors if hasattr(engine, "num_io_tensors") else _Bindings
        self._adapter: Any = adapter(engine, context)
        self.free_batch = False
        types = _numpy_types()
        names = self._adapter.names()
        for name in names:
            if self._adapter.is_input(name) and self._adapter.shape(name)[0] < 0:
                self.free_batch = True
                opt = options.get("batch", [1, 1, 1])[1]
                self._adapter.set_shape(name, (opt,) + self._adapter.shape(name)[1:])
        tensors = [
            _Tensor(
                cuda,
                name,
                self._adapter.is_input(name),
                self._adapter.shape(name),
                types[self._adapter.dtype(name)],
            )
            for name in names
        ]
        self._adapter.set_addresses(tensors)
        by_name = {tensor.name: tensor for tensor in tensors}
        self.boxes, self.scores = by_name["boxes"], by_name["scores"]
        [self.images] = [tensor for tensor in tensors if tensor.is_input]
        self.stream = cuda.Stream()

    def enqueue(self, events: Sequence[Any] = ()) -> None:
        """Copy in, infer, copy out; where four `events` are given, one before and after each."""
        before_copy, before, after, after_copy = events or (None,) * 4
        self._mark(before_copy)
        self._cuda.memcpy_htod_async(self.images.device, self.images.host, self.stream)
        self._mark(before)
        if not self._adapter.enqueue(self.stream.handle):
            raise AgentError("run", "TensorRT {} could not run the engine".format(trt.__version__))
        self._mark(after)
        for tensor in (self.boxes, self.scores):
            self._cuda.memcpy_dtoh_async(tensor.host, tensor.device, self.stream)
        self._mark(after_copy)

    def _mark(self, event: Any) -> None:
        if event is not None:
            event.record(self.stream)


def _deserialised(path: str, options: Dict[str, Any], logger: Any) -> Any:
    """The engine in a file, None where it does not load."""
    runtime = trt.Runtime(logger)
    if options.get("dla_core") is not None:
        runtime.DLA_core = options["dla_core"]
    with open(path, "rb") as file:
        return runtime.deserialize_cuda_engine(file.read())


class TensorRtRunner(Runner):
    """An engine on the GPU. The thread that makes the first one owns the CUDA context, and alone uses it."""

    def __init__(self, path: str, options: Dict[str, Any]) -> None:
        self._cuda = cuda_driver()
        _Context.enter(self._cuda)
        try:
            self._load(path, options)
        except BaseException:
            self.close()
            raise

    def _load(self, path: str, options: Dict[str, Any]) -> None:
        printed = _Printed()
        self._logger = _logger()
        self._engine = _deserialised(path, options, self._logger)
        self._options = options
        self._lanes: List[_Lane] = []
        if self._engine is None or not self._add_lane():
            reason = printed.reason() or "it gave no reason"
            message = "TensorRT {} does not load the engine: {}".format(trt.__version__, reason)
            raise AgentError(
                "engine", message, "build it again on this device, or close what holds the memory"
            )
        [lane] = self._lanes
        self.uint8 = lane.images.host.dtype == np.uint8
        shape = lane.images.shape
        self.input_size = (shape[1], shape[2]) if self.uint8 else (shape[2], shape[3])
        self._events = [self._cuda.Event() for _ in range(4)]

    def _add_lane(self) -> bool:
        """Whether there was memory for one more image in flight."""
        context = self._engine.create_execution_context()
        if context is not None:
            self._lanes.append(_Lane(self._cuda, self._engine, context, self._options))
        return context is not None

    def run(self, images: np.ndarray) -> Detections:
        lane = self._lanes[0]
        np.copyto(lane.images.host, images)
        lane.enqueue()
        lane.stream.synchronize()
        return Detections(
            lane.boxes.host[0].astype(np.float32, copy=False),
            lane.scores.host[0].astype(np.float32, copy=False),
        )

    def measure(self, images: np.ndarray, runs: int) -> Dict[str, List[float]]:
        """By the GPU's clock: "engine" without the copies, "engine_with_copies" with them."""
        lane = self._lanes[0]
        np.copyto(lane.images.host, images)
        engine, with_copies = [], []
        before_copy, before, after, after_copy = self._events
        for _ in range(runs):
            lane.enqueue(self._events)
            lane.stream.synchronize()
            engine.append(float(before.time_till(after)))
            with_copies.append(float(before_copy.time_till(after_copy)))
        return {"engine": engine, "engine_with_copies": with_copies}

    def seconds_in_flight(self, images: np.ndarray, runs: int) -> Optional[float]:
        """Two images in flight, each on a stream of its own: one is copied while the other is worked on.

        None with a free batch, since before TensorRT 10 two contexts cannot share the range of its shapes, and
        where the memory holds one alone.
        """
        if self._lanes[0].free_batch:
            return None
        try:
            if len(self._lanes) < IN_FLIGHT and not self._add_lane():
                return None
        except self._cuda.Error:
            return None
        for lane in self._lanes:
            np.copyto(lane.images.host, images)
            lane.enqueue()
        for number in range(runs + IN_FLIGHT):
            lane = self._lanes[number % IN_FLIGHT]
            lane.stream.synchronize()
            if number == IN_FLIGHT - 1:  # the first ones had the GPU to themselves
                start = time.perf_counter()
            if number < runs:
                lane.enqueue()
        return time.perf_counter() - start

    def profile(self, images: np.ndarray, runs: int) -> Dict[str, List[float]]:
        profiler = _Profiler()
        lane = self._lanes[0]
        lane.context.profiler = profiler
        np.copyto(lane.images.host, images)
        for _ in range(runs):
            lane.enqueue()
            lane.stream.synchronize()
        return profiler.times_ms

    def close(self) -> None:
        # What lies on the GPU goes before the CUDA context that it belongs to.
        for name in ("_lanes", "_engine", "_events"):
            if hasattr(self, name):
                delattr(self, name)
        _Context.leave()


class _Profiler(trt.IProfiler):  # type: ignore[misc]
    """Collects each layer's time of each run."""

    def __init__(self) -> None:
        trt.IProfiler.__init__(self)
        self.times_ms: Dict[str, List[float]] = {}

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        self.times_ms.setdefault(layer_name, []).append(ms)
