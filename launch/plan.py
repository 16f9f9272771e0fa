"""What a recipe needs on hardware that is not here; nothing is allocated, the real compilers are asked.

python launch/plan.py --config=configs/rtd_8b.py --target=a100-80gb:8      (also tpu-v5p:2x2x2, tpu-v6e:4x4, cpu:8)
"""

import dataclasses
import functools
from pathlib import Path

import entry
from absl import flags

from rtd_jax.apps.plan.plan import plan, print_plan, to_json
from rtd_jax.apps.plan.targets import find_target, prepare_backends
from rtd_jax.base.files import write_json
from rtd_jax.train.recipe import Recipe

TARGET = flags.DEFINE_string("target", "a100-80gb:8", "Hardware and how much of it.")
DOLLARS = flags.DEFINE_float("dollars_per_device_hour", None, "Price of a device and hour; default: assumed.")
JSON = flags.DEFINE_string("json", None, "Also write the numbers to this file.")


def main(recipe: Recipe, _: Path) -> None:
    prepare_backends(TARGET.value)
    target = find_target(TARGET.value)
    if DOLLARS.value is not None:
        target = dataclasses.replace(target, chip=dataclasses.replace(target.chip, dollars=DOLLARS.value))
    found = plan(recipe, target, functools.partial(print, flush=True))
    print_plan(recipe, target, found)
    if JSON.value:
        write_json(Path(JSON.value), to_json(target, found))


if __name__ == "__main__":
    entry.run(Recipe, main)
