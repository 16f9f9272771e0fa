"""Chains of the bundled tiny teacher on generated problems: the whole way on a laptop, in about a minute.

    python launch/traces.py --config=configs/traces_tiny.py                                   # in this process
    transformers serve rtd_jax/bundled/tiny_teacher --port 8000                               # or from a server:
    python launch/traces.py --config=configs/traces_tiny.py --workdir=runs/served \
        --config.backend=openai --config.openai.model=rtd_jax/bundled/tiny_teacher

`transformers serve` decodes greedily, whatever the temperature, unless the model's generation_config.json says
`"do_sample": true`; the bundled teacher has none, so ask it for one sample there.
"""

from ml_collections import ConfigDict

from configs.rtd_tiny import BUNDLED_TEACHER
from rtd_jax.apps.traces.traces import TracesRecipe
from rtd_jax.base.settings import defaults


def get_config() -> ConfigDict:
    c = defaults(TracesRecipe)
    c.problems.schema = "synthetic"  # the generator; its training split is disjoint from validation and test
    c.problems.limit = 600  # problems
    c.problems.depths = (1, 2, 3, 4, 5, 6)  # reasoning steps, equally often

    c.text.kind = "plain"  # a base model; chat asks through the tokenizer's template
    c.text.prompt_template = "Question: {prompt}\nAnswer:\n"  # what the tiny tokenizer is made for
    c.text.completion_prefix = ""  # the tiny tokenizer's words have no space in front

    c.sampling.samples = 2  # chains of each problem
    c.sampling.temperature = 1.0  # the model's own distribution ..
    c.sampling.top_p = 1.0  # .. and all of it
    c.sampling.max_tokens = 128  # of a chain; what reaches it is unfinished

    c.backend = "jax"  # jax: a teacher in this process; openai: a server of OpenAI's completions API
    c.jax.path = str(BUNDLED_TEACHER)  # Hugging Face folder or hub name
    c.jax.param_dtype = "float32"  # CPUs have no fast bfloat16
    c.jax.compute_dtype = "float32"  # likewise
    c.jax.batch_size = 100  # chains written at one time; what a kill can cost at most
    c.openai.concurrency = 4  # requests under way, to a server on this machine
    c.openai.timeout = 60.0  # seconds for one reply

    c.selection.max_depth_share = 0.5  # of the kept chains, that one depth (1, 2, 3, 4, 5+) may have
    c.selection.tokenizer = str(BUNDLED_TEACHER)  # chains with words unknown to it are unparsable; its words are few
    c.output.rows_per_shard = 1_000  # chains: several shards, for a look at them
    return c
