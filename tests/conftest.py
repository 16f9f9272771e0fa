"""Eight simulated CPU devices for every test, no network, and each program compiled once for all processes."""

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rtd_jax.base.simulated_devices import give_threads

os.environ["JAX_PLATFORMS"] = "cpu"
# Eight devices share few cores with other tests. XLA gives up on devices that meet late, by default after 40 seconds.
_DEVICES = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
# Most programs of the tests run for less time than LLVM would spend on making them fast.
_COMPILER = "--xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES} {_COMPILER}"
give_threads()
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Most of the suite's time would be the same programs, compiled again in each process that a test starts. Whoever sets
# JAX_COMPILATION_CACHE_DIR keeps them from one run of the tests to the next.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _COMPILED = tempfile.mkdtemp(prefix="rtd_jax-compiled-")
    atexit.register(shutil.rmtree, _COMPILED, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.fixture(scope="module", autouse=True)
def _programs_are_dropped() -> Iterator[None]:
    """Unmaps the programs of a file's tests, which no other file's tests run.

    Each program that XLA's CPU compiler makes is mapped into the process in several parts. Linux gives a process 65,530
    of them (vm.max_map_count); half of the suite in one process needs more, and then crashes inside the compiler.
    """
    yield
    import jax  # after the settings above

    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the original GSM8K, StrategyQA and ARC files, where a checkout has it beside itself."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"original data sets are not in {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture
def smollm2(tmp_path: Path) -> Path:
    """SmolLM2-135M-Instruct in a folder of links, which a server may write beside."""
    from real_weights import real_weights_dir  # jax must find the settings above

    try:
        folder = real_weights_dir()
    except ValueError as error:
        pytest.skip(str(error))
    model = tmp_path / "smollm2"
    model.mkdir()
    for path in folder.iterdir():
        (model / path.name).symlink_to(path.resolve())
    return model
