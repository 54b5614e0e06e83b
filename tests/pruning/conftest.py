"""What the tests of schedule and checkpoint share."""

from pathlib import Path

import pytest
import squares


@pytest.fixture(scope="session")
def square_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the data of `squares.write_data` and a trained detector."""
    folder = tmp_path_factory.mktemp("squares")
    squares.write_data(folder)
    return folder
