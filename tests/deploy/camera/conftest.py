"""An agent that runs the camera for real."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from camera_jobs import camera_job
from small_model import write_model

from edgeprune.deploy.records import Engine
from edgeprune.deploy.session import Session, local_session
from edgeprune.deploy.targets import load_target


@pytest.fixture
def session(work: Path, events: list[Mapping[str, Any]]) -> Session:
    return local_session(load_target("host"), work, events.append)


@pytest.fixture
def engine(session: Session, tmp_path: Path) -> Engine:
    return session.build(write_model(tmp_path / "model.onnx"))


@pytest.fixture
def run(session: Session, engine: Engine) -> Callable[..., Any]:
    """Run the agent's camera on a source until it ends; other fields of the job by name."""
    return lambda source, **fields: session._call("camera", camera_job(engine, source, **fields))
