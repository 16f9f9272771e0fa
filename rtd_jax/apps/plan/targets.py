"""Hardware by name, as devices that programs can be compiled for but not run on.

`a100-80gb:8` and the like need the wheels of jax's GPU plugin, `tpu-..` those of libtpu; neither needs a driver or a
chip. Rates are from the vendors' data sheets, without sparsity. Prices are assumed, and right in order of magnitude.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax.experimental import topologies

# XLA's GpuTargetConfig: what a driver would report about the card. These fields are the same for all of them.
_ALL_GPUS = """threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
threads_per_core_limit: 2048 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
registers_per_core_limit: 65536 registers_per_block_limit: 65536"""
_A100_80GB = """core_count: 108 fpus_per_core: 64 shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912
memory_bandwidth: 2039000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.41 device_memory_size: 85050916864
cuda_compute_capability { major: 8 }"""
_H100_80GB = """core_count: 132 fpus_per_core: 128 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
cuda_compute_capability { major: 9 }"""


@dataclass(frozen=True)
class Chip:
    """One device of a kind."""

    memory: float  # bytes that a program may use
    flops: float  # bfloat16 matrix FLOP/s
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s that a device can send to the others, all its links together
    dollars: float  # per device and hour


@dataclass(frozen=True)
class Target:
    """Devices to compile for, in mesh order, and what each of them can do."""

    name: str
    chip: Chip
    devices: list[jax.Device]


A100 = Chip(memory=80 * 2**30 * 0.97, flops=312e12, bandwidth=2.039e12, link=300e9, dollars=3.40)
H100 = Chip(memory=80 * 2**30 * 0.97, flops=989e12, bandwidth=3.35e12, link=450e9, dollars=6.90)
_V5P = Chip(memory=95 * 2**30, flops=459e12, bandwidth=2.765e12, link=600e9, dollars=4.20)
_V6E = Chip(memory=32 * 2**30, flops=918e12, bandwidth=1.64e12, link=448e9, dollars=2.70)
# A laptop, for tests and for looking at programs. The numbers give the order of magnitude only.
_CPU = Chip(memory=16 * 2**30, flops=1e11, bandwidth=2e10, link=1e10, dollars=0.0)


def find_target(text: str) -> Target:
    """The devices of a name `kind:size`: "a100-80gb:8", "h100-80gb:8", "tpu-v5p:2x2x2", "tpu-v6e:4x4", "cpu:8".

    Raises:
      ValueError: the kind is unknown, the size has another form, or the compiler for the kind is not installed.
    """
    kind, _, size = text.partition(":")
    if kind not in _KINDS:
        raise ValueError(
            f"target {text!r} is unknown; use one of {', '.join(f'{k}:{s}' for k, (_, s, _) in _KINDS.items())}"
        )
    chip, example, make = _KINDS[kind]
    if not re.fullmatch(r"\d+" if "x" not in example else r"\d+(x\d+)+", size):
        raise ValueError(f"target {text!r} has no size of the form of {kind}:{example}")
    return Target(text, chip, make(size))


def _gpus(name: str, fields: str) -> Callable[[str], list[jax.Device]]:
    config = (
        f"gpu_device_info {{ {_ALL_GPUS} {fields} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{name}"'
    )
    return lambda size: _topology("cuda", "gpu", topology=f"1x1x{size}", target_config=config, extra="plan-gpu")


def _tpus(prefix: str) -> Callable[[str], list[jax.Device]]:
    return lambda size: _topology("tpu", f"{prefix}:{size}", extra="plan-tpu")


def _topology(platform: str, name: str, *, extra: str, **options: str) -> list[jax.Device]:
    try:
        return list(topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices)
    except Exception as error:  # the plugins raise whatever they like
        raise ValueError(
            f"no compiler for {platform} {name} ({str(error).splitlines()[0]}); install it with "
            f"`pip install -e '.[{extra}]'` and start with launch/plan.py, which sets JAX_PLATFORMS"
        ) from error


def _cpus(size: str) -> list[jax.Device]:
    devices = jax.devices("cpu")
    if len(devices) < int(size):
        raise ValueError(
            f"target cpu:{size} needs XLA_FLAGS=--xla_force_host_platform_device_count={size}; there are {len(devices)}"
        )
    return devices[: int(size)]


_KINDS: dict[str, tuple[Chip, str, Callable[[str], list[jax.Device]]]] = {
    "a100-80gb": (A100, "8", _gpus("NVIDIA A100-SXM4-80GB", _A100_80GB)),
    "h100-80gb": (H100, "8", _gpus("NVIDIA H100 80GB HBM3", _H100_80GB)),
    "tpu-v5p": (_V5P, "2x2x2", _tpus("v5p")),
    "tpu-v6e": (_V6E, "4x4", _tpus("v6e")),
    "cpu": (_CPU, "8", _cpus),
}


def prepare_backends(text: str) -> None:
    """Makes jax use the CPU only, and tells the plugins that there is no driver. Call it before using jax.

    Compilers are called through their plugins, which needs no backend; a TPU backend would look for a chip and fail.
    """
    kind, _, size = text.partition(":")
    jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no metadata server to ask on a machine without TPUs
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nothing is run, so two plans may compile side by side
    if kind == "cpu" and size.isdigit():
        jax.config.update("jax_num_cpu_devices", int(size))
