"""How the bundled classifier of the bundled tiny teacher was made.

    python launch/boundaries.py --config=configs/boundaries_tiny.py

The generator's problems, their lines joined by spaces; the teacher was trained on lines only. Takes some minutes on two
cores. docs/segmentation.md has the result; to bundle another one, copy runs/boundaries_tiny/classifier.
"""

from ml_collections import ConfigDict

from rtd_jax.apps.boundaries import BoundaryRecipe, HeldOut
from rtd_jax.base.settings import defaults


def get_config() -> ConfigDict:
    c = defaults(BoundaryRecipe)
    c.teacher.path = "rtd_jax/bundled/tiny_teacher"  # a Hugging Face folder or hub name
    c.teacher.param_dtype = "float32"  # CPUs have no fast bfloat16
    c.teacher.compute_dtype = "float32"  # likewise
    c.layers = (1, 2, 3, 4)  # all of them; 4 is the final normed state
    c.batch_size = 64  # rows that the teacher reads at one time
    c.states = "runs/boundary_states"  # folder that keeps hidden states

    _set_problems(c.train, "train", 5_000)
    c.train_chains = 4_500  # the first by a hash of the prompt
    c.validation_chains = 500  # the next
    c.text.prompt_template = "Question: {prompt}\nAnswer:\n"  # what the tiny tokenizer is made for
    c.text.completion_prefix = ""  # the tiny tokenizer's words have no space in front

    for name, form in (("synthetic", "plain"), ("synthetic_marked", "marked")):
        c.tests[name] = defaults(HeldOut)
        _set_problems(c.tests[name].source, "test", 600)
        c.tests[name].chains = 600  # all
        c.tests[name].form = form  # plain: no marks; marked: as it was

    c.head.width = 32  # hidden units; the teacher has 128
    c.head.dilations = (1, 2)  # tokens to either side that a block reads
    c.fit.learning_rate = 2e-3  # peak
    return c


def _set_problems(source: ConfigDict, split: str, limit: int) -> None:
    source.schema = "synthetic"  # the generator; its splits are disjoint
    source.split = split  # of the generator
    source.limit = limit  # problems
    source.depths = (1, 2, 3, 4, 5, 6)  # reasoning steps, equally often
