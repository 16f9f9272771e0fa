"""Eight simulated CPU devices for every test, and no network."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the original GSM8K, StrategyQA and ARC files, where a checkout has it beside itself."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"original data sets are not in {SHARED_DATA}")
    return SHARED_DATA
