"""pycuda.driver as documented (documen.tician.de/pycuda/driver.html), for what the agent calls.

Work on a stream happens when the stream is synchronised, so that code which reads too early fails. Calls from
a thread other than the one that made the context fail, as they do on a GPU.
"""

import os
import threading

import numpy as np

_CAPABILITY = tuple(int(part) for part in os.environ.get("EDGEPRUNE_TEST_CAPABILITY", "5.3").split("."))
_contexts = []
_memory = {}


class Error(Exception):
    pass


class LogicError(Error):
    pass


class MemoryError(Error):
    pass


def _need_context():
    if len(_contexts) > 1:
        raise LogicError("memory of one context would be used in another one")
    if not _contexts or _contexts[-1]._thread != threading.get_ident():
        raise LogicError("invalid device context")


def init(flags=0):
    if os.environ.get("EDGEPRUNE_TEST_NO_DRIVER"):
        raise LogicError("cuInit failed: no CUDA-capable device is detected")


class Device:
    def __init__(self, number):
        self._number = number

    def name(self):
        return "NVIDIA Tegra X1"

    def compute_capability(self):
        return _CAPABILITY

    def total_memory(self):
        return 3964 << 20

    def make_context(self, flags=0):
        _contexts.append(Context())
        return _contexts[-1]


class Context:
    def __init__(self):
        self._thread = threading.get_ident()

    @staticmethod
    def pop():
        _need_context()
        _contexts.pop()

    def detach(self):
        if _contexts:
            raise LogicError("another context is still there")
        if _memory:
            raise LogicError(f"{len(_memory)} allocations outlive their context")


class DeviceAllocation:
    def __init__(self, size):
        _need_context()
        held = sum(len(memory) for memory in _memory.values())
        if held + size > int(os.environ.get("EDGEPRUNE_TEST_GPU_BYTES", "1000000000")):
            raise MemoryError("cuMemAlloc failed: out of memory")
        self._address = 4096 * (1 + max([address // 4096 + 1 for address in _memory] or [0]))
        _memory[self._address] = np.zeros(size, np.uint8)

    def __int__(self):
        return self._address

    def __del__(self):
        _memory.pop(self._address, None)


def mem_alloc(size):
    return DeviceAllocation(size)


def pagelocked_empty(shape, dtype, order="C", mem_flags=0):
    _need_context()
    return np.empty(shape, dtype)


class Stream:
    def __init__(self, flags=0):
        _need_context()
        self._work = []
        self.handle = id(self)
        _Stream.known[self.handle] = self

    def later(self, work):
        self._work.append(work)

    def synchronize(self):
        _need_context()
        if os.environ.get("EDGEPRUNE_TEST_STREAMS"):  # a line a wait: streams that have work meanwhile
            with open(os.environ["EDGEPRUNE_TEST_STREAMS"], "a", encoding="utf-8") as file:
                busy = sum(bool(stream._work) for stream in _Stream.known.values() if stream is not self)
                file.write(str(busy) + "\n")
        work, self._work = self._work, []
        for step in work:
            step()


class _Stream:
    known = {}

    @classmethod
    def of(cls, handle):
        return cls.known[handle]


class Event:
    _clock = 0.0

    def record(self, stream=None):
        def mark():
            Event._clock += 0.5  # ms between any two events on a stream
            self._time = Event._clock

        stream.later(mark)
        return self

    def synchronize(self):
        return self

    def time_till(self, other):
        return other._time - self._time


def memcpy_htod_async(dest, src, stream=None):
    content = src  # read when it happens: changing it before is an error of the caller, as on a GPU
    stream.later(
        lambda: _bytes_at(int(dest), content.nbytes).__setitem__(slice(None), content.view(np.uint8).ravel())
    )


def memcpy_dtoh_async(dest, src, stream=None):
    stream.later(lambda: np.copyto(dest.view(np.uint8).reshape(-1), _bytes_at(int(src), dest.nbytes)))


def _bytes_at(address, size):
    return _memory[address][:size]


def _array_at(address, shape, dtype):
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return _memory[address][:count].view(dtype).reshape(shape)
