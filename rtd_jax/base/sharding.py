"""One device mesh, and tables from logical axes to mesh axes.

Mesh axes: `data` (replicas of everything), `fsdp` (rows of the batch, and a slice of every weight), `tensor` (heads,
MLP and vocabulary). Weights have logical axes (rtd_jax/models/weights.py), and a table assigns each to mesh axes.
Teacher and student may use different tables: the weights of a frozen 70B can stay in place while activations travel.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rtd_jax.base.settings import SettingError

ROW_AXES = ("data", "fsdp")  # the batch axis is spread over both

MeshAxes = str | tuple[str, ...] | None
LogicalToMesh = Mapping[str, MeshAxes]

# Weights are sliced over fsdp and gathered for each layer; rows stay on their devices.
FSDP: LogicalToMesh = {
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "head_dim": None,
    "norm": None,
    "rank": None,
    "student_width": "fsdp",
    "teacher_width": "tensor",
}
# Every device computes its heads, its part of the MLP and of the vocabulary for all rows of its replica.
_SPLIT = ("fsdp", "tensor")
TENSOR: LogicalToMesh = {**FSDP, "embed": None, "vocab": _SPLIT, "heads": _SPLIT, "kv_heads": _SPLIT, "mlp": _SPLIT}
TABLES = {"fsdp": FSDP, "tensor": TENSOR}


@dataclass(frozen=True)
class MeshSettings:
    """Size of each mesh axis, in devices. One of them may be -1: whatever is left."""

    data: int = 1  # devices: replicas of everything
    fsdp: int = -1  # devices that share rows and weights
    tensor: int = 1  # devices that share heads, MLP and vocabulary

    def __post_init__(self) -> None:
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for name, size in sizes.items():
            if not (size == -1 or 1 <= size <= 1_000_000):
                raise SettingError(f"{name} is {size}; expected 1 to 1,000,000 devices, or -1: what is left")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"mesh sizes data, fsdp, tensor are {list(sizes.values())}; at most one of them can be -1")


def make_mesh(settings: MeshSettings, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over all devices.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [settings.data, settings.fsdp, settings.tensor]
    known = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh data {sizes[0]} x fsdp {sizes[1]} x tensor {sizes[2]} = {math.prod(sizes)}, but there are "
            f"{len(devices)} devices; set one axis to -1 to take what is left"
        )
    return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=devices)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over (data, fsdp); every other axis whole."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def activation_sharding(mesh: Mesh, table: LogicalToMesh = FSDP) -> NamedSharding:
    """Sharding of the [B, L, D] activations between layers, for a given weight-sharding table."""
    return NamedSharding(mesh, PartitionSpec(tuple(axis for axis in ROW_AXES if axis not in _names(table["mlp"]))))


def row_ways(mesh: Mesh) -> int:
    """Number of equal parts into which the mesh cuts the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: Any, mesh: Mesh | None, *axes: Any) -> Any:
    """`x` with its dimensions spread over mesh axes as PartitionSpec names them; unchanged without a mesh.

    A dimension that its mesh axes do not divide stays whole.
    """
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, mesh_spec(x.shape, axes, mesh)))


def mesh_spec(shape: tuple[int, ...], axes: Sequence[MeshAxes], mesh: Mesh) -> PartitionSpec:
    """Spec of an array whose dimensions are spread over mesh axes where these divide them, and whole otherwise.

    It has no mesh axis of one device and no trailing None, as the compiler writes specs: jit compares them literally.
    """

    def dividing_axes(size: int, axis: MeshAxes) -> MeshAxes:
        names = tuple(name for name in _names(axis) if mesh.shape[name] > 1)
        if not names or size % math.prod(mesh.shape[name] for name in names):
            return None
        return names[0] if len(names) == 1 else names

    spec = [dividing_axes(size, axis) for size, axis in zip(shape, axes, strict=True)]
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def _names(axis: MeshAxes) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else axis or ()


def check_rows(rows: int, mesh: Mesh, micro_batches: int = 1, name: str = "batch_size") -> None:
    """Raises ValueError when `rows` cannot be spread over the mesh in `micro_batches` equal parts."""
    ways = row_ways(mesh) * micro_batches
    if rows % ways:
        lower = rows // ways * ways
        options = f"{lower} or {lower + ways}" if lower else f"{ways}"
        raise ValueError(
            f"{name} {rows} is not divisible by the {ways // micro_batches}-way data axis x {micro_batches} "
            f"micro-batches; use {options}"
        )


def param_shardings(abstract: Any, logical_axes: Any, mesh: Mesh, table: LogicalToMesh = FSDP) -> Any:
    """NamedSharding for each leaf of `abstract`, from the tuple of logical axes at the same place.

    A dimension that its mesh axis does not divide (3 KV heads over 2 devices) stays whole: correct, only less spread.
    """

    def sharding(leaf: Any, axes: tuple[str, ...]) -> NamedSharding:
        return NamedSharding(mesh, mesh_spec(leaf.shape, [table[axis] for axis in axes], mesh))

    return jax.tree.map(sharding, abstract, logical_axes)


def in_host_memory(shardings: Any) -> Any:
    """The same shardings, each device's part in its host's pinned memory."""
    return jax.tree.map(lambda sharding: sharding.with_memory_kind("pinned_host"), shardings)


def host_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process feeds part `index` of the `count` equal, contiguous parts of a batch's rows.

    It differs from (process index, process count): processes that differ only along `tensor` feed the same rows.

    Raises:
      ValueError: the mesh gives this process rows that are not contiguous.
    """
    ways = row_ways(mesh)
    parts = row_sharding(mesh).addressable_devices_indices_map((ways,)).values()
    starts = sorted({part[0].start or 0 for part in parts if part is not None})
    first, length = starts[0], len(starts)
    if starts != list(range(first, first + length)) or first % length or ways % length:
        raise ValueError(
            f"mesh {dict(mesh.shape)} gives process {jax.process_index()} the parts {starts} of {ways} of every batch; "
            "choose mesh sizes that keep a process's devices together, with tensor the innermost"
        )
    return first // length, ways // length


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Makes global arrays, rows spread over (data, fsdp), from the rows that each process holds (its `host_share`)."""
    sharding = row_sharding(mesh)
    _, parts = host_share(mesh)

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(sharding, x, (x.shape[0] * parts, *x.shape[1:]))

    return jax.tree.map(put, batch)


def put_same(tree: Any, sharding: NamedSharding | None) -> Any:
    """Makes global arrays from host arrays that every process holds whole; returns them unchanged without a sharding.

    An array of fewer dimensions than the sharding's spec takes the first entries of the spec.
    """
    if sharding is None:
        return tree
    mesh, spec = sharding.mesh, sharding.spec
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec[: x.ndim]))), tree)


def to_host(tree: Any) -> Any:
    """Copies global arrays to whole NumPy arrays on every process; all processes must call it."""

    def fetch(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(fetch, tree)
