"""What `camera` does: which detectors look, on which device, and what is shown meanwhile."""

import json
import sys
import time
import webbrowser
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from rich.live import Live
from rich.text import Text

from edgeprune.cli.interrupt import instead
from edgeprune.cli.progress import console, device_progress, say
from edgeprune.cli.run_device import RunDevice, run_connection, run_target
from edgeprune.cli.run_folder import RunError, RunFolder
from edgeprune.data.errors import EdgePruneError
from edgeprune.data.files import read_json, sha256_of
from edgeprune.data.operating_point import Calibration
from edgeprune.data.precision import OPERATING_THRESHOLD
from edgeprune.deploy.bundle import write_camera_bundle
from edgeprune.deploy.camera import LOOPBACK, CameraOptions, camera_job, check_source, send_source, watch
from edgeprune.deploy.camera_service import install_service
from edgeprune.deploy.connection import Connection
from edgeprune.deploy.device.imaging import Preprocessing, Thresholds
from edgeprune.deploy.records import CameraSummary, Engine
from edgeprune.deploy.session import new_job_folder
from edgeprune.deploy.transport import Stop

LINE_EVERY_S = 5.0  # where there is no terminal
ENDED = {"max_frames": "--max-frames reached", "max_seconds": "--max-seconds reached"}


class Detectors(NamedTuple):
    """What looks."""

    models: Mapping[str, Path]  # by the name that is shown: "step 2"
    precision: str
    preprocessing: Preprocessing
    thresholds: Sequence[Thresholds]  # one a model


def detectors_of(run: RunFolder, chosen: tuple[int, int] | int | None, score: float | None) -> Detectors:
    """The models of the chosen steps, and the score from which each reports.

    Args:
        chosen: two steps to compare, or one; None: the last one exported.
        score: None: what was chosen for the step by `calibrate`, else the usual one.

    Raises:
        EdgePruneError: If a step is not there or not exported, or its files do not belong together.
    """
    config = run.read_record().config
    exported = [step for step in run.steps() if (run.step(step) / "export.json").is_file()]
    if not exported:
        raise RunError(f"{run.path} has no model yet: run `edgeprune export {run.path}`")
    steps = chosen if isinstance(chosen, tuple) else (exported[-1] if chosen is None else chosen,)
    models = {f"step {step}": _model(run, step, exported) for step in steps}
    records = {step: read_json(run.step(step) / "detector.json") for step in steps}
    thresholds = [
        Thresholds(score=_score(run, step, record["weights_sha256"]) if score is None else score)
        for step, record in records.items()
    ]
    preprocessing = Preprocessing.from_json(records[steps[0]]["spec"]["preprocessing"])
    return Detectors(models, config.precision, preprocessing, thresholds)


def _model(run: RunFolder, step: int, exported: list[int]) -> Path:
    if step not in exported:
        raise RunError(f"{run.path} has no model of step {step}: it has {', '.join(map(str, exported))}")
    model = run.step(step) / "model.onnx"
    if sha256_of(model) != read_json(run.step(step) / "export.json").get("sha256"):
        raise RunError(
            f"{model} is not the file that export.json describes: run `edgeprune export {run.path}`"
        )
    return model


def _score(run: RunFolder, step: int, weights_sha256: str) -> float:
    found = Calibration.read(run.step(step), weights_sha256)
    if found is None:
        say(
            f"Step {step} reports from score {OPERATING_THRESHOLD:g} up, which nobody chose: `edgeprune calibrate "
            f"{run.path} --step {step} --precision 0.9` does."
        )
        return OPERATING_THRESHOLD
    say(f"Step {step} reports from score {found.point.threshold:.3f} up, chosen for {found.wish}.")
    return found.point.threshold


@contextmanager
def device_of(run: RunFolder, connection: Connection) -> Iterator[RunDevice]:
    """The device that is named, else the run's; nothing of the connection is left behind."""
    if connection == Connection():
        connection = replace(run_connection(run.path), bundle=None)
    target = run.read_record().config.target
    device = RunDevice.find(target, connection, meanwhile="this machine stands in for it")
    try:
        yield device
    finally:
        device.session.transport.close()


def prepare(device: RunDevice, detectors: Detectors, options: CameraOptions) -> dict[str, Engine]:
    """The detectors' engines on the device, by their names; the source is tried first: they may take minutes."""
    with device_progress("opening the source") as device.session.progress:
        check_source(device.session, options)
    return {
        name: device.build(model, detectors.precision, f"{name}: building the engine")
        for name, model in detectors.models.items()
    }


def show(
    device: RunDevice, detectors: Detectors, options: CameraOptions, lines: TextIO | None, *, view: bool
) -> CameraSummary:
    """Run the camera and show what it reports, until it ends or ctrl-C is pressed.

    Args:
        lines: takes each frame's detections as a line of JSON.
        view: open the page in the browser.
    """
    engines, stop = prepare(device, detectors, options), Stop()
    with _live() as show_line, ExitStack() as running:

        def on_event(event: Mapping[str, Any]) -> None:
            if event["event"] == "listening":
                running.enter_context(instead(stop))
                _say_page(event, options, view=view)
            elif event["event"] == "camera":
                show_line(_line(event))
            elif event["event"] == "detections" and lines:
                found = {name: value for name, value in event.items() if name != "event"}
                lines.write(json.dumps(found) + "\n")
                lines.flush()
            elif event["event"] == "waiting":
                say("Waiting for another job on the same device ...")

        return watch(
            device.session,
            engines,
            detectors.preprocessing,
            detectors.thresholds,
            options,
            on_event=on_event,
            stop=stop,
        )


def _say_page(event: Mapping[str, Any], options: CameraOptions, *, view: bool) -> None:
    if event["address"] is None:
        say(f"The page cannot be seen from here: {event['reason']}")
        return
    say(f"The camera is at {event['address']} (ctrl-C ends it)")
    if options.listen_host not in LOOPBACK:
        say(f"Other machines reach it at port {event['port']} of the device, with the token.")
    if view and not _opens(event["address"]):
        say("No browser was found here: open that address in one.")


def _opens(address: str) -> bool:
    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return False
    in_terminal = isinstance(browser, webbrowser.GenericBrowser) and not isinstance(
        browser, webbrowser.BackgroundBrowser
    )  # it would take the terminal that the numbers are shown on
    return not in_terminal and browser.open(address)


def install(device: RunDevice, detectors: Detectors, options: CameraOptions, name: str) -> None:
    """Have the device's systemd run the camera, and say how it is looked at."""
    session = device.session
    source, _ = send_source(session, options.source)
    job = camera_job({}, source, detectors.preprocessing, detectors.thresholds, options, new_job_folder())
    service = install_service(session, job, name, lambda: prepare(device, detectors, options))
    say(
        f"{service.unit} runs on {session.transport.name}; its page is port {options.listen_port} there: "
        f"{options.address(options.listen_host, options.listen_port)}"
    )
    say(f"There: systemctl --user status {service.unit}; journalctl --user -u {service.unit}")
    if not service.lingers:
        say(
            f"It runs while {service.user} is logged in; from boot on after `sudo loginctl enable-linger "
            f"{service.user}` there."
        )


def bundle(run: RunFolder, detectors: Detectors, options: CameraOptions, connection: Connection) -> None:
    """Write the archive that runs the camera on a board without a connection, and say how."""
    assert connection.bundle is not None
    target = run_target(run.path, run.read_record().config.target)
    if connection.backend is not None:
        target = target.without_tensorrt()
    job = camera_job({}, options.source, detectors.preprocessing, detectors.thresholds, options, ".")
    write_camera_bundle(
        connection.bundle,
        target,
        detectors.models,
        job,
        precision=detectors.precision,
        options=connection.engine_options(target),
        power_mode=connection.power_mode,
        lock_clocks=connection.lock_clocks,
    )
    say(
        f"Next: copy {connection.bundle} to the board, unpack it there and run `sh camera.sh [SOURCE]` in it."
    )


@contextmanager
def lines_to(path: Path | None) -> Iterator[TextIO | None]:
    """Where detections go, line by line: a file grows while the camera runs."""
    if path is None:
        yield None
    elif path == Path("-"):
        yield sys.stdout
    else:
        try:
            file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise EdgePruneError(f"cannot write {path}: {error.strerror}") from error
        with file:
            yield file


@contextmanager
def _live() -> Iterator[Callable[[str], None]]:
    """Shows the newest numbers, on standard error: in place on a terminal, else a line now and then."""
    if console.is_terminal:
        with Live(console=console, transient=True, auto_refresh=False) as live:
            yield lambda line: live.update(Text(line), refresh=True)
        return
    last_s = -LINE_EVERY_S

    def show_line(line: str) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= LINE_EVERY_S:
            last_s = time.monotonic()
            say(line)

    yield show_line


def _line(event: Mapping[str, Any]) -> str:
    """The numbers of about a second."""
    engines = event.get("engines", [])
    parts = [f"{event['fps']:.1f} FPS"]
    parts += [f"{engine['name']} alone {engine['fps']:.1f}" for engine in engines]
    if event["latency_ms"] is not None:
        stages = " ".join(f"{name} {ms:.1f}" for name, ms in event["stages_ms"].items())
        parts.append(f"{event['latency_ms']:.1f} ms to the boxes ({stages})")
    parts.append(f"people {event['people']}")
    parts.append(f"{event['frames']} frames, {event['dropped']} dropped")
    for name, unit in (("temperature_c", "°C"), ("power_w", "W")):
        if event.get(name) is not None:
            parts.append(f"{event[name]:.1f} {unit}")
    return ", ".join(parts)


def rows(summary: CameraSummary) -> list[dict[str, Any]]:
    """Times by what took them, for a person."""
    times = {"from frame to boxes": summary.latency_ms, **summary.stages_ms}
    if len(summary.engines) > 1:
        for engine in summary.engines:
            times |= {f"{engine['name']}: {stage}": ms for stage, ms in engine["stages_ms"].items()}
    times |= {"output": summary.output_ms, "waiting for a frame": summary.wait_ms}
    return [
        {"stage": stage, **{f"{name}_ms": ms[name] for name in ("mean", "p50", "p90", "p99")}}
        for stage, ms in times.items()
    ]


def say_end(summary: CameraSummary, options: CameraOptions) -> None:
    rate = f" ({summary.fps:.1f} FPS)" if summary.fps else ""
    reached = f", reconnected {summary.reconnects} times" if summary.reconnects else ""
    say(
        f"{summary.frames} frames in {summary.seconds:.1f} s{rate}, {summary.dropped} dropped{reached}; "
        f"{ENDED.get(summary.ended, summary.ended)}"
    )
    if len(summary.engines) > 1:
        say(", ".join(f"{engine['name']} alone {engine['fps'] or 0:.1f} FPS" for engine in summary.engines))
    for path in (options.save, options.snapshots):
        if path is not None and summary.frames and path.exists():
            say(str(path))
