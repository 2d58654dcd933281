import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks: threads that wait for one another cost more than they bring

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@pytest.fixture
def folders(tmp_path):
    """Options that keep a run's results and checkpoints inside the test's own folder."""
    return ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
