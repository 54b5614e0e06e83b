"""What the tests of deployment share."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from agent_venvs import Missing, ensure
from small_model import write_images, write_model


@pytest.fixture
def events() -> list[Mapping[str, Any]]:
    return []


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.onnx")


@pytest.fixture
def images(tmp_path: Path) -> dict[int, Path]:
    return write_images(tmp_path)


def agent_python(name: str) -> str:
    """The interpreter of an agent environment; without one the test fails in CI, and is skipped elsewhere."""
    try:
        return str(ensure(name))
    except Missing as error:
        if os.environ.get("CI"):
            pytest.fail(f"Python {name} is needed for the agent's tests: {error}")
        pytest.skip(f"Python {name}: {error}")


@pytest.fixture(scope="session", name="agent_python")
def agent_python_fixture() -> Callable[[str], str]:
    return agent_python
