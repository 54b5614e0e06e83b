"""Frames, read in a process of their own: a driver that hangs or crashes takes only that one with it.

The process reads as fast as the source gives, into three slots of shared memory: one that is being written,
the newest one, and the one that the pipeline works on. Over its standard input the pipeline asks for a frame,
a byte each, and so gives its slot back; the answer is a line of JSON. The slots are files without a name,
which the kernel removes when the last process that has them open ends, however it ends.
"""

import json
import mmap
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Dict, Generator, List, NamedTuple, Optional, Tuple

import cv2
import numpy as np

from ..child import die_with_parent, environment
from ..errors import AgentError
from ..imaging import ImageError, load_image
from .sources import Source, images_of, opening_failure

OPENING_S = 30.0  # a camera that takes longer to give its first frame is taken to hang
STALLED_S = 10.0  # without a frame
END_S = 5.0  # to close the source in order, of agent.GRACE_S: a CSI camera that was not closed stays busy
BACK_OFF_S = (1.0, 30.0)  # between attempts to reach a network camera again: doubled from the first on
SAID_BYTES = 4000  # kept of what the process prints
SLOTS = 3
DIED = "its capture process ended"
MEMORY_FOLDER = "/dev/shm"  # frames must not wear out an SD card


class Frame(NamedTuple):
    image: np.ndarray  # (H, W, 3) uint8 BGR; overwritten once the next one is asked for
    number: int  # from 0; dropped ones count
    arrival_s: float  # monotonic clock, when the capture process had it; of a stored source, gave it


class Capture:
    """The newest frames of a live source, every frame of a stored one. Ends its process on leaving `with`.

    Attributes:
        dropped: frames that came and were not taken.
        reconnects: how often a network camera was reached again.
        ended: whether the source has no more frames.
        fps: what the source says; 0 where it says nothing.
    """

    def __init__(self, source: Source, settings: Dict[str, Any]) -> None:
        self.dropped = 0
        self.reconnects = 0
        self.ended = False
        self.fps = 0.0
        self._source = source
        self._settings = settings
        self._taken = 0
        self._dropped_before = 0  # by earlier processes
        self._pause_s = 0.0  # before the next attempt to reach the camera again; 0: it is there
        self._retry_s = 0.0
        self._process: Optional[_Process] = None

    def __enter__(self) -> "Capture":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stop()

    def next(self, wait_s: float) -> Optional[Frame]:
        """The next frame, None if there is none yet or `ended`.

        Raises:
            AgentError: If the source does not open or breaks off; a network camera is tried again instead.
        """
        if self._process is None:
            pause_s = self._retry_s - time.monotonic()
            if pause_s > 0:
                time.sleep(min(pause_s, wait_s))
                return None
            self._process = _Process(self._source, self._settings)
        answer = self._process.ask(wait_s)
        if answer is None:
            limit_s = STALLED_S if self._process.gave_frames else OPENING_S
            if self._process.waited_s() > limit_s:
                self._broke("no frame came for {:.0f} s".format(limit_s))
        elif answer["event"] == "frame":
            return self._frame(self._process, answer)
        elif answer["event"] == "error":
            raise AgentError(*answer["error"])
        elif answer["event"] == "end" and not self._source.live:
            self.ended = True
        else:
            self._broke(answer["reason"])
        return None

    def _frame(self, process: "_Process", answer: Dict[str, Any]) -> Frame:
        self.dropped = self._dropped_before + answer["dropped"]
        self.reconnects += self._pause_s > 0
        self._pause_s = 0.0
        self.fps = answer["fps"]
        self._taken += 1
        image = process.image(answer["slot"], answer["shape"])
        return Frame(image, self._taken - 1 + self.dropped, answer["time_s"])

    def _broke(self, reason: str) -> None:
        assert self._process is not None
        self._dropped_before = self.dropped
        opened = self._process.gave_frames
        said = self._stop()
        if self._source.kind == "network" and self._taken:
            first_s, most_s = BACK_OFF_S
            self._pause_s = min(max(first_s, 2 * self._pause_s), most_s)
            self._retry_s = time.monotonic() + self._pause_s
            return
        if not opened and reason == DIED and self._source.kind != "network":
            last = (said.strip().splitlines() or ["it said nothing"])[-1]
            raise AgentError("crashed", "{}: {}: {}".format(self._source.label, reason, last))
        if not opened:
            raise opening_failure(self._source, said)
        message = "{} broke off after {} frames: {}".format(self._source.label, self._taken, reason)
        raise AgentError("camera", message, "is it still plugged in? then run the command again")

    def _stop(self) -> str:
        process, self._process = self._process, None
        return process.end() if process else ""


class _Process:
    """The pipeline's end of a capture process."""

    def __init__(self, source: Source, settings: Dict[str, Any]) -> None:
        folder = MEMORY_FOLDER if os.access(MEMORY_FOLDER, os.W_OK) else None
        self._files = [tempfile.TemporaryFile(dir=folder) for _ in range(SLOTS)]
        self._maps: Dict[int, mmap.mmap] = {}
        numbers = [file.fileno() for file in self._files]
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=numbers,
            env=environment(),
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self._errors = self._process.stderr
        self._selector = selectors.DefaultSelector()
        for pipe in (self._output, self._errors):
            self._selector.register(pipe, selectors.EVENT_READ)
        self._rest = self._said = b""
        self._asked_s: Optional[float] = None
        self.gave_frames = False
        # Not as arguments, which every user of the device can read: the address may hold a password.
        self._write(json.dumps({"source": source, "settings": settings, "slots": numbers}).encode() + b"\n")

    def ask(self, wait_s: float) -> Optional[Dict[str, Any]]:
        """Ask for the next frame, unless that was done; its answer, or None if there is none yet."""
        if self._asked_s is None:
            self._asked_s = time.monotonic()
            self._write(b".")
        for key, _ in self._selector.select(wait_s):
            chunk = os.read(key.fd, 1 << 16)
            if key.fileobj is self._errors:
                self._said = (self._said + chunk)[-SAID_BYTES:]
                if not chunk:
                    self._selector.unregister(self._errors)
            elif not chunk:
                return {"event": "died", "reason": DIED}
            else:
                line, end, self._rest = (self._rest + chunk).partition(b"\n")
                if not end:
                    self._rest = line
                    continue
                self._asked_s = None
                answer: Dict[str, Any] = json.loads(line.decode("utf-8"))
                self.gave_frames = self.gave_frames or answer["event"] == "frame"
                return answer
        return None

    def waited_s(self) -> float:
        """Since the question that has no answer."""
        return 0.0 if self._asked_s is None else time.monotonic() - self._asked_s

    def image(self, slot: int, shape: List[int]) -> np.ndarray:
        count = int(np.prod(shape))
        if slot not in self._maps or len(self._maps[slot]) < count:
            self._maps[slot] = mmap.mmap(self._files[slot].fileno(), count, prot=mmap.PROT_READ)
        return np.frombuffer(self._maps[slot], np.uint8, count).reshape(shape)

    def end(self) -> str:
        """End the process: in order, else by force. Returns what it printed."""
        try:
            self._input.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.set_blocking(self._errors.fileno(), False)
        self._said += self._errors.read(SAID_BYTES) or b""
        self._selector.close()
        for file in (self._output, self._errors, *self._files):
            file.close()
        return self._said.decode("utf-8", "replace")

    def _write(self, content: bytes) -> None:
        try:
            self._input.write(content)
            self._input.flush()
        except BrokenPipeError:
            pass  # it ended: reading its output tells


# From here on: in the capture process.

Frames = Generator[Tuple[np.ndarray, float], None, None]  # each with the source's frames a second, 0: unknown


class _Slots:
    """Shared memory between the thread that reads frames and the one that answers."""

    def __init__(self, numbers: List[int], live: bool) -> None:
        self._numbers = numbers
        self._maps: Dict[int, mmap.mmap] = {}
        self._live = live
        self._change = threading.Condition()
        self._newest: Optional[Dict[str, Any]] = None
        self._taken: Optional[int] = None  # slot that the pipeline works on
        self._dropped = 0
        self._last: Optional[Dict[str, Any]] = None  # answered when no frame is left
        self.stopped = False

    def put(self, image: np.ndarray, fps: float) -> None:
        """Publish a frame: at once when the source is live, else when the one before was taken."""
        time_s = time.monotonic()
        with self._change:
            while not self._live and self._newest is not None and not self.stopped:
                self._change.wait()
            used = (self._taken, self._newest["slot"] if self._newest else None)
            slot = next(slot for slot in range(SLOTS) if slot not in used)
        if slot not in self._maps or len(self._maps[slot]) < image.nbytes:
            # Reserved, not only sized: memory that is not there would end the process at the first write.
            os.posix_fallocate(self._numbers[slot], 0, image.nbytes)
            self._maps[slot] = mmap.mmap(self._numbers[slot], image.nbytes)
        np.copyto(np.frombuffer(self._maps[slot], np.uint8, image.size).reshape(image.shape), image)
        message = {"event": "frame", "slot": slot, "shape": image.shape, "time_s": time_s, "fps": fps}
        with self._change:
            self._dropped += self._newest is not None
            self._newest = message
            self._change.notify_all()

    def finish(self, answer: Dict[str, Any]) -> None:
        with self._change:
            self._last = answer
            self._change.notify_all()

    def take(self) -> Dict[str, Any]:
        """Wait for a frame that was not taken yet, or the end."""
        with self._change:
            while self._newest is None and self._last is None:
                self._change.wait()
            if self._newest is None:
                assert self._last is not None
                return self._last
            message, self._newest = dict(self._newest, dropped=self._dropped), None
            if not self._live:
                message["time_s"] = time.monotonic()  # read ahead: it would have come when it is asked for
            self._taken = message["slot"]
            self._change.notify_all()
            return message

    def stop(self) -> None:
        with self._change:
            self.stopped = True
            self._change.notify_all()


def main() -> None:
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the pipeline, which ends this
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    order = json.loads(sys.stdin.buffer.readline().decode("utf-8"))
    source = Source(*order["source"])
    slots = _Slots(order["slots"], source.live)

    def serve() -> None:
        while sys.stdin.buffer.read(1):
            answers.write(json.dumps(slots.take()) + "\n")
            answers.flush()
        slots.stop()

    server = threading.Thread(target=serve)
    server.start()
    try:
        slots.finish(_read(source, order["settings"], slots))
    except AgentError as error:
        slots.finish({"event": "error", "error": (error.kind, error.message, error.remedy)})
    except OSError as error:
        message = "no memory for the frames: {}".format(error.strerror)
        slots.finish({"event": "error", "error": ("memory", message, "choose smaller ones with --capture")})
    server.join()


def _read(source: Source, settings: Dict[str, Any], slots: _Slots) -> Dict[str, Any]:
    """Read until the source ends or nobody wants more; returns how it ended."""
    frames = _images(source) if source.kind == "images" else _video(source, settings)
    count = 0
    for image, fps in frames:
        slots.put(image, fps)
        count += 1
        if slots.stopped:
            break
    frames.close()
    if not count:
        return {"event": "closed", "reason": "it does not open"}
    return {"event": "end", "reason": "no more frames came"}


def _images(source: Source) -> Frames:
    try:
        for path in images_of(source.place):
            yield load_image(path), 0.0
    except ImageError as error:
        raise AgentError("image", str(error), "replace or remove it") from None


def _video(source: Source, settings: Dict[str, Any]) -> Frames:
    backend = {"csi": cv2.CAP_GSTREAMER, "test": cv2.CAP_GSTREAMER, "usb": cv2.CAP_V4L2}
    video = cv2.VideoCapture(source.place, backend.get(source.kind, cv2.CAP_FFMPEG))
    if source.kind == "usb" and video.isOpened():
        # Motion JPEG: uncompressed, USB 2 has room for five frames of 720p a second.
        video.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*"MJPG"))
        video.set(cv2.CAP_PROP_FRAME_WIDTH, settings["width"])
        video.set(cv2.CAP_PROP_FRAME_HEIGHT, settings["height"])
        video.set(cv2.CAP_PROP_FPS, settings["fps"])
    try:
        fps = float(video.get(cv2.CAP_PROP_FPS)) if video.isOpened() else 0.0
        while True:
            there, image = video.read()
            if not there:
                return
            yield image, fps
    finally:
        video.release()


if __name__ == "__main__":
    main()
