"""Devices that XLA simulates on a CPU have threads enough to wait for each other in any order."""

import os

import pytest

from rtd_jax.base.simulated_devices import THREADS_PER_DEVICE, give_threads

EIGHT = "--xla_force_host_platform_device_count=8"


@pytest.mark.parametrize(
    "environment",
    [{"XLA_FLAGS": f"--xla_cpu_enable_fast_math=false {EIGHT}"}, {"JAX_NUM_CPU_DEVICES": "8"}],
    ids=["XLA's flag", "jax's variable"],
)
def test_simulated_devices_get_more_threads_than_there_are_of_them(environment):
    give_threads(environment)
    assert int(environment["PJRT_NPROC"]) == max(8 * THREADS_PER_DEVICE, os.cpu_count())


@pytest.mark.parametrize(
    "environment",
    [{}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}, {"XLA_FLAGS": EIGHT, "PJRT_NPROC": "3"}],
    ids=["nothing said", "one device", "the user's own number"],
)
def test_nothing_else_is_touched(environment):
    before = dict(environment)
    give_threads(environment)
    assert environment == before


def test_the_last_flag_counts_as_it_does_for_xla():
    environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {EIGHT}"}
    give_threads(environment)
    assert int(environment["PJRT_NPROC"]) >= 8 * THREADS_PER_DEVICE
