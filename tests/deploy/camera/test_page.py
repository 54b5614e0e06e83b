"""The camera's page in a browser."""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from camera_jobs import MjpegServer, camera_job
from chromium import Browser, browser

from edgeprune.deploy.device.camera.stream import Stream
from edgeprune.deploy.records import Engine
from edgeprune.deploy.session import Session
from edgeprune.deploy.transport import Stop

OVERFLOWING = """
[...document.querySelectorAll('b, span, h1, h2, section, figure')]
  .filter(e => e.clientWidth > 1 && e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML.slice(0, 80))
"""
# The colour in the middle of the picture, as the browser has decoded it.
MIDDLE = """(() => {
  const picture = document.querySelector('img'), canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
  const context = canvas.getContext('2d');
  context.drawImage(picture, 0, 0);
  return JSON.stringify([...context.getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data]);
})()"""


def numbers(count: int) -> dict[str, Any]:
    return {
        "fps": 20 + count % 10,
        "stages_ms": {"capture": 3.0, "prepare": 4.1, "run": 31.4, "postprocess": 2.2},
        "people": 3,
        "frames": count,
        "dropped": 12,
        "temperature_c": 46.5,
        "power_w": None,
    }


def compared(count: int) -> dict[str, Any]:
    stages = {"prepare": 4.1, "run": 31.4, "postprocess": 2.2}
    engines = [
        {"name": name, "fps": 20.0, "people": 3, "stages_ms": stages} for name in ("step 0", "step 12")
    ]
    return {**numbers(count), "engines": engines}


@contextmanager
def camera(stream: Stream, numbers: Callable[[int], dict[str, Any]] = numbers) -> Iterator[None]:
    """Publish as a camera would: grey level 0 to 250 over time, with a box."""
    ended = threading.Event()

    def run() -> None:
        count = 0
        while not ended.wait(1 / 30):
            count += 1
            picture = np.full((360, 640, 3), count * 5 % 255, np.uint8)
            cv2.rectangle(picture, (100, 60), (180, 300), (0, 176, 255), 2)
            stream.publish(picture, numbers(count))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def eventually(condition: Callable[[], Any], failure: str) -> Any:
    give_up_at = time.monotonic() + 15
    while not (found := condition()):
        assert time.monotonic() < give_up_at, failure
        time.sleep(0.1)
    return found


def text(tab: Browser) -> str:
    return str(tab.evaluate("document.body.innerText"))


def test_in_a_browser(tmp_path: Path) -> None:
    """Picture and numbers move, nothing overflows and nothing is complained about: 390, 1280 px, light, dark.

    EDGEPRUNE_SCREENSHOTS names a folder to look at the page in.
    """
    pictures = Path(os.environ.get("EDGEPRUNE_SCREENSHOTS", tmp_path))
    stream = Stream("127.0.0.1", 0, "secret token")
    with browser(tmp_path / "profile") as tab:
        for name, told in (("camera", numbers), ("compare", compared)):
            with camera(stream, told):
                for width in (390, 1280):
                    for dark in (False, True):
                        tab.open(f"http://127.0.0.1:{stream.port}/?token=secret%20token", width, dark)
                        eventually(lambda: "live" in text(tab), "no numbers were shown")
                        assert tab.evaluate("innerWidth") == width
                        assert tab.evaluate("document.documentElement.scrollWidth") == width
                        assert tab.evaluate(OVERFLOWING) == []
                        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
                        assert (sum(int(part) for part in re.findall(r"\d+", background)[:3]) < 384) == dark
                        tab.screenshot(pictures / f"{name}-{width}-{'dark' if dark else 'light'}.png")
                assert "not measured" in text(tab)  # the power
                assert "31.4 ms" in text(tab)
                before, colour = text(tab), tab.evaluate(MIDDLE)
                eventually(lambda: text(tab) != before, "the numbers stand still")  # noqa: B023
                eventually(lambda: tab.evaluate(MIDDLE) != colour, "the picture stands still")  # noqa: B023
        assert "step 12" in text(tab)
        assert tab.evaluate("location.href") == f"http://127.0.0.1:{stream.port}/"  # no token to be seen
        assert "secret" not in str(tab.evaluate("document.cookie + document.documentElement.outerHTML"))
        assert tab.console == []
    stream.close()


def test_what_the_page_says_when_pictures_stop(tmp_path: Path) -> None:
    """A camera that stands still, a device that went away and one that is back are told from one another."""
    stream = Stream("127.0.0.1", 0)
    with browser(tmp_path / "profile") as tab:
        with camera(stream):
            tab.open(f"http://127.0.0.1:{stream.port}/", 1280, dark=False)
            eventually(lambda: "live" in text(tab), "no numbers were shown")
        eventually(lambda: "no new picture" in text(tab), "it does not tell that the camera stands still")
        stream.close()
        eventually(lambda: "does not answer" in text(tab), "it does not tell that the device is gone")
        again = Stream("127.0.0.1", stream.port)
        with camera(again):
            eventually(lambda: "live" in text(tab), "it does not come back")
            eventually(again.wanted, "the picture does not come back")
            assert json.loads(tab.evaluate(MIDDLE))
        again.close()


def test_a_hidden_page_asks_for_no_picture(tmp_path: Path) -> None:
    """A tab in the background ends its stream, and takes it up again when it is looked at."""
    stream = Stream("127.0.0.1", 0)
    with browser(tmp_path / "profile") as tab, camera(stream):
        tab.open(f"http://127.0.0.1:{stream.port}/", 1280, dark=False)
        eventually(stream.wanted, "the page does not ask for the stream")
        hide = "Object.defineProperty(document, 'hidden', {{configurable: true, get: () => {}}})"
        change = "document.dispatchEvent(new Event('visibilitychange'))"
        tab.evaluate(hide.format("true") + ";" + change)
        eventually(lambda: not stream.wanted(), "the hidden page goes on with its stream")
        tab.evaluate(hide.format("false") + ";" + change)
        eventually(stream.wanted, "the page does not take the stream up again")
    stream.close()


def test_the_agents_camera_fills_the_page(
    session: Session, engine: Engine, events: list[Mapping[str, Any]], tmp_path: Path
) -> None:
    """Two engines side by side: picture, names and every number that the agent tells are shown."""
    pictures = Path(os.environ.get("EDGEPRUNE_SCREENSHOTS", tmp_path))
    network, stop = MjpegServer(30), Stop()
    job = camera_job(
        engine,
        f"http://127.0.0.1:{network.port}/",
        listen={"host": "127.0.0.1", "port": 0, "token": None},
        engines=[engine.to_json()] * 2,
        names=["step 0", "step 12"],
    )
    running = threading.Thread(target=lambda: session._call("camera", job, stop=stop))
    running.start()
    try:
        listening = eventually(
            lambda: [event for event in events if event["event"] == "listening"], "it does not listen"
        )
        with browser(tmp_path / "profile") as tab:
            tab.open(f"http://127.0.0.1:{listening[0]['port']}/", 1280, dark=False)
            eventually(lambda: "step 12" in text(tab), "no numbers were shown")
            eventually(lambda: "live" in text(tab), "it is not live")
            assert json.loads(tab.evaluate(MIDDLE))[3] == 255
            shown = text(tab)
            assert shown.count("FPS") == shown.count("people in view") == shown.count("prepare") == 2
            assert "undefined" not in shown
            assert "NaN" not in shown
            tab.screenshot(pictures / "agent-1280-light.png")
            assert tab.console == []
    finally:
        stop()
        running.join()
        network.close()
