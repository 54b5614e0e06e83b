"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The maintainers' data folder; tests that need it are skipped, with the reason, where it is absent."""
    folder = Path(os.environ.get("EDGEPRUNE_SHARED", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"shared data not found: {folder} is no folder (set EDGEPRUNE_SHARED)")
    return folder
