"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The maintainers' data folder; tests that need it are skipped, with the reason, where it is absent."""
    folder = Path(os.environ.get("EDGEPRUNE_SHARED", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"shared data not found: {folder} is no folder (set EDGEPRUNE_SHARED)")
    return folder


# Tests are the same in every run; HYPOTHESIS_PROFILE=search looks for new failures.
settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("search", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
