"""One of several processes: trains three updates on meshes that span them, and compares with one device's parameters.

python tests/multihost_worker.py <coordinator> <processes> <process> <expected.npz>
"""

import json
import sys

import jax

if __name__ == "__main__":
    coordinator, processes, process, expected = sys.argv[1:]
    jax.distributed.initialize(coordinator, int(processes), int(process))

    from dataclasses import replace

    import numpy as np
    from test_train_update import PACKED, UNPACKED, UPDATE, after_updates

    from rtd_jax.base.sharding import MeshSettings

    CASES = {
        "data": ((4, 1, 1), 1, PACKED),
        "fsdp": ((1, 4, 1), 1, PACKED),
        "tensor across processes": ((2, 1, 2), 1, PACKED),
        "tensor only": ((1, 1, 4), 1, PACKED),
        "mixed, 2 micro-batches": ((1, 2, 2), 2, PACKED),
        "unpacked, 4 micro-batches": ((2, 2, 1), 4, UNPACKED),
    }
    single = np.load(expected)
    worst = {}
    for name, (sizes, micro_batches, data) in CASES.items():
        settings = replace(UPDATE, micro_batches=micro_batches)
        state, _ = after_updates(MeshSettings(*sizes), data, settings)
        leaves = jax.tree.leaves(state.params)
        worst[name] = max(
            float(np.max(np.abs(got - single[f"arr_{i}"]) / (1e-5 * np.abs(single[f"arr_{i}"]) + 1e-6)))
            for i, got in enumerate(leaves)
        )
    print("RESULT", json.dumps({"devices": jax.device_count(), "worst": worst}))
