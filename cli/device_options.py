"""The options that say how a device is reached; commands that need a device take them all."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgeprune.cli.option_group import take

if TYPE_CHECKING:
    from edgeprune.deploy.connection import Connection

Host = Annotated[
    str | None,
    typer.Option(
        help="The device, as ssh knows it: user@name, or a name of ~/.ssh/config. Default: this machine.",
        show_default=False,
    ),
]
DeviceFolder = Annotated[
    str | None,
    typer.Option(help="Work folder on the device. Default: ~/.cache/edgeprune/device.", show_default=False),
]
DevicePython = Annotated[
    str | None,
    typer.Option(
        help="The device's Python that has the runtime. Default: the system's, which has JetPack's TensorRT.",
        show_default=False,
    ),
]
SshConfig = Annotated[
    Path | None,
    typer.Option(help="An ssh configuration file instead of ~/.ssh/config.", show_default=False),
]
Bundle = Annotated[
    Path | None,
    typer.Option(
        help="Write an archive (.tar.gz) that does the rest on a board without a connection; "
        "`edgeprune import` takes its results back. Meanwhile this machine is measured.",
        show_default=False,
    ),
]
Backend = Annotated[
    Literal["onnxruntime"] | None,
    typer.Option(
        help="onnxruntime: a Jetson's CPU instead of TensorRT on its GPU; the results say so.",
        show_default=False,
    ),
]
PowerMode = Annotated[
    str | None,
    typer.Option(
        help="Power mode for benchmarks, by its name on the board; put back afterwards (needs sudo there).",
        show_default=False,
    ),
]
LockClocks = Annotated[
    bool,
    typer.Option(
        "--lock-clocks",
        help="Hold clocks at their highest during benchmarks; put back afterwards (needs sudo).",
    ),
]
Via = Annotated[
    Literal["trtexec"] | None,
    typer.Option(
        help="trtexec: build with TensorRT's own command instead of its Python module.", show_default=False
    ),
]
WorkspaceMib = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Memory that TensorRT may try while it builds. Default: from the free memory.",
        show_default=False,
    ),
]
DlaCore = Annotated[
    int | None,
    typer.Option(
        min=0, help="Build for this DLA core; what it cannot do runs on the GPU.", show_default=False
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Use a board whose GPU is another than the target's.")]


def _options(
    *,
    host: Host = None,
    device_folder: DeviceFolder = None,
    device_python: DevicePython = None,
    ssh_config: SshConfig = None,
    bundle: Bundle = None,
    backend: Backend = None,
    power_mode: PowerMode = None,
    lock_clocks: LockClocks = False,
    via: Via = None,
    workspace_mib: WorkspaceMib = None,
    dla_core: DlaCore = None,
    force: Force = False,
) -> None:
    """The options, in the order in which help shows them."""


def with_device(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options to a command, which takes them as one `connection`."""
    return take(command, "connection", _options, _connection, first=False)


def _connection(chosen: Mapping[str, Any]) -> "Connection":
    from edgeprune.deploy.connection import Connection

    values = dict(chosen)
    for name, value in values.items():
        if isinstance(value, Path):  # a run keeps them, and goes on from any folder
            values[name] = value.absolute()
    return Connection(**values)
