"""Threads for the devices that XLA simulates on a CPU (`--xla_force_host_platform_device_count`)."""

import os
import re
from collections.abc import MutableMapping

# A device waits for the others in a thread of its own. XLA for CPUs does not order collectives that do not need each
# other's results, so that one device waits in several at once, in another order than its neighbour. With a thread for
# each device, as the client makes them, all of them can wait for devices that have no thread left, and the run hangs.
THREADS_PER_DEVICE = 4

_DEVICE_COUNT = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


def give_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets `PJRT_NPROC`, the number of threads of the CPU client, where several devices are simulated.

    It must be called before jax makes its client. A number that is already set is kept.
    """
    flags = _DEVICE_COUNT.findall(environment.get("XLA_FLAGS", ""))
    counts = [*flags[-1:], environment.get("JAX_NUM_CPU_DEVICES", "")]
    devices = max((int(count) for count in counts if count.isdecimal()), default=1)
    if devices > 1:
        threads = max(THREADS_PER_DEVICE * devices, os.cpu_count() or 1)
        environment.setdefault("PJRT_NPROC", str(threads))
