"""`camera`: a run's detector on live pictures, on its device, to be seen from here."""

import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeprune.cli import Json, Run, Verbose, app
from edgeprune.cli.device_options import with_device

if TYPE_CHECKING:
    from edgeprune.deploy.connection import Connection

TOKEN_BYTES = 16


@app.command("camera")
@with_device
def _camera(
    connection: "Connection",
    run: Run,
    step: Annotated[
        int | None,
        typer.Option(
            min=0, help="Step whose detector looks. Default: the last one exported.", show_default=False
        ),
    ] = None,
    compare: Annotated[
        tuple[int, int] | None,
        typer.Option(
            metavar="STEP STEP",
            help="Two steps side by side on the same frames, each with its FPS.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        str,
        typer.Option(
            help="csi://0, /dev/video0, a video, a folder of images, rtsp://..., http(s)://..., or test://, a test "
            "pattern. A video of this machine is sent to the device."
        ),
    ] = "csi://0",
    capture: Annotated[
        str, typer.Option(metavar="WIDTHxHEIGHT@FPS", help="What is asked of a camera.")
    ] = "1280x720@30",
    score_threshold: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Score from which a person is reported. Default: what `edgeprune calibrate` chose, else 0.3.",
            show_default=False,
        ),
    ] = None,
    track: Annotated[
        bool, typer.Option("--track", help="Follow people from frame to frame: each gets an id.")
    ] = False,
    view: Annotated[bool, typer.Option("--view", help="Open the page in this machine's browser.")] = False,
    listen: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Where the page listens on the device; port 0 is any free one. Another host than 127.0.0.1 lets "
            "other machines look who know the token.",
        ),
    ] = "127.0.0.1:0",
    token: Annotated[
        str | None,
        typer.Option(
            help="What a viewer has to know. Default: none on 127.0.0.1, elsewhere a new one, printed once.",
            show_default=False,
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(help="Video with the boxes to write here, .avi or .mp4.", show_default=False),
    ] = None,
    jsonl: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|-",
            help="Write each frame's boxes as a line of JSON; - is standard output, which then has nothing else.",
            show_default=False,
        ),
    ] = None,
    snapshots: Annotated[
        Path | None,
        typer.Option(help="Folder to write a picture into when a person is seen.", show_default=False),
    ] = None,
    cooldown_s: Annotated[
        float, typer.Option(min=0.0, help="Seconds from one snapshot to the next, at least.")
    ] = 10.0,
    max_frames: Annotated[
        int | None, typer.Option(min=1, help="End after so many frames.", show_default=False)
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(min=0.1, help="End after so many seconds.", show_default=False)
    ] = None,
    install_service: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Have the device's systemd run this camera from now on, also after a boot; one of that name is "
            "replaced.",
            show_default=False,
        ),
    ] = None,
    remove_service: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Stop such a camera and remove it.", show_default=False),
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show what a step detects, live, on the run's device or the one that --host names.

    Ctrl-C ends it: the summary is printed and the exit status is 0. Pressed again it ends at once, with 130.
    """
    from edgeprune.cli import watching
    from edgeprune.cli.output import print_json, print_rows
    from edgeprune.cli.run_folder import RunFolder
    from edgeprune.deploy.camera import CameraOptions
    from edgeprune.deploy.camera_service import remove_service as remove

    if step is not None and compare is not None:
        raise typer.BadParameter("choose one of --step and --compare")
    if compare is not None and compare[0] == compare[1]:
        raise typer.BadParameter("--compare takes two steps that differ")
    if connection.bundle is not None and install_service is not None:
        raise typer.BadParameter("choose one of --bundle and --install-service")
    if json and jsonl == Path("-"):
        raise typer.BadParameter("--json and --jsonl - both want standard output")
    host, port = _listen(listen)
    options = CameraOptions(
        source,
        *_mode(capture),
        listen_host=host,
        listen_port=port,
        token=_token(token, host),
        save=_video(save),
        jsonl=jsonl is not None,
        snapshots=_snapshots(snapshots),
        cooldown_s=cooldown_s,
        track=track,
        max_frames=max_frames,
        max_seconds=max_seconds,
    )
    folder = RunFolder(run)
    if remove_service is not None:
        with watching.device_of(folder, connection) as device:
            remove(device.session, remove_service)
        return
    detectors = watching.detectors_of(folder, step if compare is None else compare, score_threshold)
    if connection.bundle is not None:
        watching.bundle(folder, detectors, options, connection)
        return
    with watching.device_of(folder, connection) as device:
        if install_service is not None:
            watching.install(device, detectors, options, install_service)
            return
        with watching.lines_to(jsonl) as lines:
            summary = watching.show(device, detectors, options, lines, view=view)
    if json:
        print_json(summary.to_json())
    elif jsonl != Path("-"):
        print_rows(watching.rows(summary), as_json=False)
    watching.say_end(summary, options)


def _listen(text: str) -> tuple[str, int]:
    found = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\s]+)):(\d{1,5})", text)
    if found is None or int(found[3]) > 65535:
        raise typer.BadParameter(f"--listen takes HOST:PORT, as 127.0.0.1:8080, not {text!r}")
    return found[1] or found[2], int(found[3])


def _token(given: str | None, host: str) -> str | None:
    from edgeprune.deploy.camera import LOOPBACK

    if given is None and host not in LOOPBACK:
        return secrets.token_urlsafe(TOKEN_BYTES)
    if given is not None and not re.fullmatch(r"[\w.~-]{8,}", given, re.ASCII):
        raise typer.BadParameter("--token takes at least 8 letters, digits and any of . _ ~ -")
    return given


def _mode(text: str) -> tuple[int, int, int]:
    found = re.fullmatch(r"(\d{2,5})x(\d{2,5})@(\d{1,3})", text)
    if found is None:
        raise typer.BadParameter(f"--capture takes WIDTHxHEIGHT@FPS, as 1280x720@30, not {text!r}")
    return int(found[1]), int(found[2]), int(found[3])


def _video(path: Path | None) -> Path | None:
    from edgeprune.deploy.device.camera.outputs import CODECS

    if path is None:
        return None
    if path.suffix.lower() not in CODECS:
        raise typer.BadParameter(f"--save writes a file that ends in {' or '.join(sorted(CODECS))}")
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"--save {path}: there is no folder {path.parent}")
    return path.absolute()


def _snapshots(folder: Path | None) -> Path | None:
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--snapshots {folder}: {error.strerror}") from error
    return folder.absolute()
