"""The row schemas that a recipe can name. A new one is a file here, and its name in the two lists below."""

from rtd_jax.data.schemas import arc, gsm8k, math, prm800k, processbench, prose, stepwise, strategyqa
from rtd_jax.data.schemas.schema import Schema

_MODULES = (gsm8k, math, strategyqa, arc, stepwise, prose, processbench, prm800k)

SCHEMAS: dict[str, Schema] = {module.SCHEMA.name: module.SCHEMA for module in _MODULES}
