"""The generated problems that a recipe can name. A new one is a file here, and its name in the two lists below."""

from rtd_jax.data.generators import cups, lift, word_problems
from rtd_jax.data.generators.streams import Generator

GENERATORS: dict[str, Generator] = {module.GENERATOR.name: module.GENERATOR for module in (word_problems, cups, lift)}
