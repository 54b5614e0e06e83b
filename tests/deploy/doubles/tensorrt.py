"""A test double of TensorRT's Python module, for any version in trt_names.tsv (EDGEPRUNE_TEST_TENSORRT).

It has exactly the names that the version has: any other raises AttributeError, as on the board. Engines hold
the ONNX file and run in ONNX Runtime. It proves that the agent's calls fit a version, never that an engine is
right.

A model's producer_name steers what cannot be computed here: "half", "int8" (types of its layers), "no-memory"
(the first build fails), "no-engine" (every build fails), "crash" (the build ends the process).
"""

import os
import signal
import sys

import numpy as np
import onnxruntime

__version__ = os.environ["EDGEPRUNE_TEST_TENSORRT"]
_RELEASE = tuple(int(part) for part in __version__.split(".")[:2])


def _names():
    path = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "trt_names.tsv")
    with open(path, encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file][1:]
    return {(row[0], row[1]) for row in rows if __version__ in row[2].split(" ")}


_NAMES = _names()


class _Missing(type):
    """Hides the class attributes that the version lacks."""

    def __getattribute__(cls, name):
        if not name.startswith("_") and (cls.__name__, name) not in _NAMES:
            raise AttributeError(f"TensorRT {__version__} has no {cls.__name__}.{name}")
        return type.__getattribute__(cls, name)


class _Double(metaclass=_Missing):
    """Hides the instance attributes that the version lacks, for reading and for writing."""

    def _check(self, name):
        for kind in type(self).__mro__:
            if name.startswith("_") or (kind.__name__, name) in _NAMES or kind.__dict__.get("_own", False):
                return
        raise AttributeError(f"TensorRT {__version__} has no {type(self).__name__}.{name}")

    def __getattribute__(self, name):
        if not name.startswith("_"):
            object.__getattribute__(self, "_check")(name)
        return object.__getattribute__(self, name)

    def __setattr__(self, name, value):
        self._check(name)
        object.__setattr__(self, name, value)


def _say(severity, text):
    sys.stderr.write(f"[11/25/2026-00:00:00] [TRT] [{severity}] {text}\n")
    sys.stderr.flush()


class Logger(_Double):
    def __init__(self, min_severity=None):
        pass


class IProfiler(_Double):
    _own = True  # subclasses are the user's

    def __init__(self):
        pass


class NetworkDefinitionCreationFlag(_Double):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class BuilderFlag(_Double):
    FP16, INT8, GPU_FALLBACK = "fp16", "int8", "gpu-fallback"


class MemoryPoolType(_Double):
    WORKSPACE = "workspace"


class DeviceType(_Double):
    GPU, DLA = "gpu", "dla"


class ProfilingVerbosity(_Double):
    DETAILED = "detailed"


class TensorIOMode(_Double):
    INPUT, OUTPUT = "input", "output"


class DataType(_Double):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8 = "float32", "float16", "int8", "int32", "bool", "uint8"


_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}


def _session(content):
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    return onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])


def _shape(value, batch=-1):
    return tuple(size if isinstance(size, int) else batch for size in value.shape)


class ITensor(_Double):
    def __init__(self, name, shape, dtype):
        self.name, self.shape, self.dtype = name, shape, dtype


class ILayer(_Double):
    def __init__(self, dtype):
        self.num_outputs = 1
        self._dtype = dtype

    def get_output(self, index):
        return ITensor("value", (1,), self._dtype)


class INetworkDefinition(_Double):
    def __init__(self, flags):
        if _RELEASE < (10, 0) and flags != 1 << NetworkDefinitionCreationFlag.EXPLICIT_BATCH:
            raise RuntimeError("the parser needs an explicit batch")
        self._content = b""
        self.num_inputs = self.num_outputs = self.num_layers = 0

    def _fill(self, content):
        session = _session(content)
        self._content = content
        self._inputs, self._outputs = session.get_inputs(), session.get_outputs()
        self.num_inputs, self.num_outputs, self.num_layers = len(self._inputs), len(self._outputs), 2

    def get_input(self, index):
        value = self._inputs[index]
        return ITensor(value.name, _shape(value), _TYPES[value.type])

    def get_output(self, index):
        value = self._outputs[index]
        return ITensor(value.name, _shape(value), _TYPES[value.type])

    def get_layer(self, index):
        kinds = {b"half": "float16", b"int8": "int8"}
        found = [dtype for mark, dtype in kinds.items() if b"\x12\x04" + mark in self._content]
        return ILayer(found[0] if found and index else "float32")


class ParserError(_Double):
    def code(self):
        return "ErrorCode.INVALID_NODE"

    def node(self):
        return 3

    def desc(self):
        return "no importer for the operator"

    def node_operator(self):
        return "Mod"

    def node_name(self):
        return "/head/Mod"


class OnnxParser(_Double):
    def __init__(self, network, logger):
        self._network = network
        self.num_errors = 0

    def parse(self, content):
        if not content:
            return True  # as TensorRT does: no error, and no outputs
        try:
            self._network._fill(content)
        except Exception:
            self.num_errors = 1
            return False
        return True

    def get_error(self, index):
        return ParserError()


class ITimingCache(_Double):
    def __init__(self, content):
        self._content = content

    def serialize(self):
        return self._content + b"."


class IOptimizationProfile(_Double):
    def set_shape(self, name, least, best, most):
        self._shapes = (least, best, most)


class IBuilderConfig(_Double):
    def __init__(self):
        self._flags = set()
        self._profiles = []
        self._cache = None
        self._limits = {}
        for name, value in (
            ("max_workspace_size", 0),
            ("profiling_verbosity", None),
            ("builder_optimization_level", 3),
            ("default_device_type", DeviceType.GPU),
            ("DLA_core", -1),
        ):
            if ("IBuilderConfig", name) in _NAMES:
                setattr(self, name, value)

    def set_memory_pool_limit(self, pool, size):
        self._limits[pool] = size

    def set_flag(self, flag):
        self._flags.add(flag)

    def add_optimization_profile(self, profile):
        self._profiles.append(profile)

    def create_timing_cache(self, content):
        return (
            None if content and not content.startswith(b"cache") else ITimingCache(bytes(content) or b"cache")
        )

    def set_timing_cache(self, cache, ignore_mismatch):
        self._cache = cache
        return True

    def get_timing_cache(self):
        return self._cache


class Builder(_Double):
    _failures = 0

    def __init__(self, logger):
        if os.environ.get("EDGEPRUNE_TEST_NO_DRIVER"):
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.num_DLA_cores = 2
        if ("Builder", "platform_has_fast_fp16") in _NAMES:
            self.platform_has_fast_fp16 = True

    def create_network(self, flags=0):
        return INetworkDefinition(flags)

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        limit = config._limits.get("workspace") or config.max_workspace_size
        _say("W", f"workspace {limit >> 20} MiB, flags {sorted(config._flags)}")
        if b"no-engine" in network._content:
            _say("E", "4: [network.cpp::validate::1] no implementation for node /head/Mod")
            return None
        if b"no-memory" in network._content and Builder._failures == 0:
            Builder._failures = 1
            _say("E", "2: [ltWrapper.cpp] Insufficient memory for the builder")
            return None
        if b"crash" in network._content:
            os.kill(os.getpid(), signal.SIGSEGV)
        if network.get_input(0).shape[0] < 0 and not config._profiles:
            _say("E", "4: the network has dynamic inputs and no optimization profile")
            return None
        return b"ENGINE " + __version__.encode() + b"\n" + network._content


class Runtime(_Double):
    def __init__(self, logger):
        self.DLA_core = -1

    def deserialize_cuda_engine(self, content):
        head, _, model = content.partition(b"\n")
        if head != b"ENGINE " + __version__.encode():
            _say("E", "1: [stdArchiveReader.cpp] Serialization assertion: version tag does not match")
            return None
        return ICudaEngine(model)


class ICudaEngine(_Double):
    def __init__(self, model):
        self._session = _session(model)
        self._io = self._session.get_inputs() + self._session.get_outputs()
        self._input_count = len(self._session.get_inputs())
        for name, value in (
            ("num_bindings", len(self._io)),
            ("num_io_tensors", len(self._io)),
            ("device_memory_size", 5 << 20),
            ("device_memory_size_v2", 5 << 20),
        ):
            if ("ICudaEngine", name) in _NAMES:
                setattr(self, name, value)

    def _index(self, name):
        return [value.name for value in self._io].index(name)

    def create_execution_context(self):
        return IExecutionContext(self)

    def get_binding_name(self, index):
        return self._io[index].name

    def get_binding_index(self, name):
        return self._index(name)

    def binding_is_input(self, index):
        return index < self._input_count

    def get_binding_dtype(self, index):
        return _TYPES[self._io[index].type]

    def get_tensor_name(self, index):
        return self._io[index].name

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if self._index(name) < self._input_count else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return _TYPES[self._io[self._index(name)].type]


class IExecutionContext(_Double):
    def __init__(self, engine):
        self._engine = engine
        self._addresses = {}
        self._batch = -1
        self.profiler = None

    def _run(self, addresses):
        from pycuda import driver

        feeds, results = {}, {}
        for value in self._engine._io:
            array = driver._array_at(addresses[value.name], _shape(value, self._batch), _TYPES[value.type])
            (feeds if len(feeds) < self._engine._input_count else results)[value.name] = array
        for name, found in zip(results, self._engine._session.run(list(results), feeds)):
            np.copyto(results[name], found)
        if self.profiler is not None:
            self.profiler.report_layer_time("stem", 0.25)
            self.profiler.report_layer_time("head + sigmoid", 0.5)

    def _enqueue(self, addresses, stream):
        from pycuda import driver

        driver._Stream.of(stream).later(lambda: self._run(addresses))
        return True

    def get_binding_shape(self, index):
        return _shape(self._engine._io[index], self._batch)

    def set_binding_shape(self, index, shape):
        self._batch = shape[0]
        return True

    def execute_async_v2(self, bindings, stream_handle):
        return self._enqueue(
            {value.name: bindings[i] for i, value in enumerate(self._engine._io)}, stream_handle
        )

    def get_tensor_shape(self, name):
        return _shape(self._engine._io[self._engine._index(name)], self._batch)

    def set_input_shape(self, name, shape):
        self._batch = shape[0]
        return True

    def set_tensor_address(self, name, address):
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream_handle):
        return self._enqueue(dict(self._addresses), stream_handle)


for _kind, _ in list(globals().items()):
    if isinstance(globals()[_kind], _Missing) and _kind[0] != "_" and (_kind, "") not in _NAMES:
        del globals()[_kind]
