"""Settings that every test shares."""

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))  # tests/ranks.py


def pytest_collection_finish() -> None:
    """Leave the imported libraries out of garbage collection: accelerate collects in every run, half a second each."""
    gc.freeze()
