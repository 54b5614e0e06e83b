"""Where a run is measured: on its target's device, or on this machine while a bundle waits."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeprune.cli.progress import device_progress, say
from edgeprune.data.files import read_json, write_json
from edgeprune.deploy.bundle import BenchmarkPlan, write_bundle
from edgeprune.deploy.connection import AUTO, Connection, NoDevice, connect
from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.deploy.errors import TargetError
from edgeprune.deploy.records import Engine
from edgeprune.deploy.session import Session, local_session
from edgeprune.deploy.targets import Target, load_target

RECORD = "device.json"  # in the run folder: how its device is reached, and what was found there
BUNDLE_RECORD = "bundle.json"
BUNDLE = "bundle.tar.gz"
MEANWHILE = "speed is measured on this machine, and a bundle is written"


@dataclass(frozen=True)
class RunDevice:
    """The device of a run."""

    target: Target  # what models are made for
    connection: Connection
    session: Session
    away: bool  # the session is with this machine, since there is no way to the target's device

    @classmethod
    def find(cls, target: str, connection: Connection, meanwhile: str = MEANWHILE) -> "RunDevice":
        """Reach a target's device, or this machine instead of a board that is out of reach.

        Args:
            meanwhile: what is said to happen here until the board is reached.

        Raises:
            DeviceError: If the device is there and cannot do its work.
        """
        if connection.bundle is None:
            try:
                session = connect(target, connection)
                return cls(session.target, connection, session, away=False)
            except NoDevice as error:
                say(f"{error}. Until then, {meanwhile}.")
        if target == AUTO:
            raise TargetError("--bundle writes for a kind of device: name it with --target")
        here = local_session(load_target("host"))
        here.probe()
        return cls(load_target(target), connection, here, away=True)

    @classmethod
    def of(cls, folder: Path, target: str) -> "RunDevice":
        """The device of an existing run, reached anew."""
        return cls.find(target, run_connection(folder))

    def save(self, folder: Path) -> None:
        record = {"connection": self.connection.to_json(), "target": asdict(self.target)}
        write_json(folder / RECORD, record)

    def build(self, model: Path, precision: str, title: str) -> Engine:
        """The model's engine on the device, which keeps engines by what they were built from.

        This machine, standing in, builds in fp32: it has nothing else.
        """
        with device_progress(title) as self.session.progress:
            return self.session.build(
                model,
                "fp32" if self.away else precision,
                self.connection.engine_options(self.session.target),
            )

    def write_bundle(
        self,
        folder: Path,
        models: Sequence[Path],
        images: Mapping[int, Path],
        preprocessing: Preprocessing,
        precision: str,
    ) -> None:
        """Write what is to be run on the device by hand, and say how."""
        path = self.connection.bundle or folder / BUNDLE
        plan_sha256 = write_bundle(
            path,
            self.target if self.connection.backend is None else self.target.without_tensorrt(),
            models,
            images,
            preprocessing,
            precision=precision,
            options=self.connection.engine_options(self.target),
            benchmark=BenchmarkPlan(),
            power_mode=self.connection.power_mode,
            lock_clocks=self.connection.lock_clocks,
        )
        write_json(folder / BUNDLE_RECORD, {"plan_sha256": plan_sha256})
        say(
            f"The figures are this machine's, not a {self.target.name}'s. Next: copy {path} to the board, "
            f"unpack it there and run `sh run.sh`, then here `edgeprune import {folder} results.tar.gz`; or "
            "give --host user@name."
        )


def run_connection(folder: Path) -> Connection:
    """How a run's device is reached; this machine where none was named."""
    return _read(folder)[0] if (folder / RECORD).is_file() else Connection()


def run_target(folder: Path, name: str) -> Target:
    """A run's target as its device was found, else with its defaults."""
    if (folder / RECORD).is_file():
        found = _read(folder)[1]
        if found.name == name:
            return found
    return load_target(name)


def plan_of(folder: Path) -> str:
    """The SHA-256 of the plan in the run's last bundle; EdgePruneError if there is none."""
    sha256: str = read_json(folder / BUNDLE_RECORD)["plan_sha256"]
    return sha256


def _read(folder: Path) -> tuple[Connection, Target]:
    record: dict[str, Any] = read_json(folder / RECORD)
    fields = {**record["target"], "precisions": tuple(record["target"]["precisions"])}
    return Connection.from_json(record["connection"]), Target(**fields)
