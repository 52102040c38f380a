"""What tests of several folders share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data():
    """The folder of reference data: ``../shared/data``, or what ``EVIDENCE_SHARED_DATA`` names."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("EVIDENCE_SHARED_DATA", default))
    if not (folder / "README.md").is_file():
        pytest.skip(f"no reference data in {folder}; set EVIDENCE_SHARED_DATA to the folder that holds them")
    return folder
