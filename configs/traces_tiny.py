"""Chains of the bundled tiny teacher on generated problems: the whole way on a laptop, in about a minute.

    python launch/traces.py --config=configs/traces_tiny.py                                   # in this process
    transformers serve rtd_jax/bundled/tiny_teacher --port 8000                               # or from a server:
    python launch/traces.py --config=configs/traces_tiny.py --workdir=runs/served \
        --config.backend=openai --config.openai.model=rtd_jax/bundled/tiny_teacher

`transformers serve` decodes greedily, whatever the temperature, unless the model's generation_config.json says
`"do_sample": true`; the bundled teacher has none, so ask it for one sample there.
"""

from pathlib import Path

from ml_collections import ConfigDict

BUNDLED_TEACHER = Path(__file__).resolve().parents[1] / "rtd_jax" / "bundled" / "tiny_teacher"


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.problems = ConfigDict()
    c.problems.schema = "synthetic"  # the generator
    c.problems.split = "train"  # disjoint from its validation and test
    c.problems.limit = 600  # problems
    c.problems.depths = (1, 2, 3, 4, 5, 6)  # reasoning steps, equally often
    c.problems.seed = 0  # of the generator

    c.text = ConfigDict()
    c.text.kind = "plain"  # a base model; chat asks through the tokenizer's template
    c.text.prompt_template = "Question: {prompt}\nAnswer:\n"  # what the tiny tokenizer is made for
    c.text.completion_prefix = ""  # between prompt and completion

    c.sampling = ConfigDict()
    c.sampling.samples = 2  # chains of each problem
    c.sampling.temperature = 1.0  # 0 is greedy
    c.sampling.top_p = 1.0  # smallest set of ids that reaches this probability; 1 keeps all
    c.sampling.max_tokens = 128  # of a chain; what reaches it is unfinished
    c.sampling.stop = ()  # texts that end a chain
    c.sampling.seed = 0  # each request has its own, made from this

    c.backend = "jax"  # jax: a teacher in this process; openai: a server of OpenAI's completions API
    c.jax = ConfigDict()
    c.jax.path = str(BUNDLED_TEACHER)  # Hugging Face folder or hub name
    c.jax.param_dtype = "float32"  # of the weights in memory
    c.jax.compute_dtype = "float32"  # of matrix products and states
    c.jax.batch_size = 100  # chains written at one time; what a kill can cost at most

    c.openai = ConfigDict()
    c.openai.base_url = "http://localhost:8000/v1"  # of the server
    c.openai.model = ""  # as the server names it
    c.openai.concurrency = 4  # requests under way
    c.openai.requests_per_minute = 0  # started at most; 0 is no limit
    c.openai.timeout = 60.0  # seconds for one reply
    c.openai.retries = 8  # of a request that fails in a way that may pass
    c.openai.extra_body = ""  # further fields of a request as a JSON object, such as '{"top_k": 50}'
    c.openai.skip_refused = False  # count a request that the server refuses instead of stopping

    c.selection = ConfigDict()
    c.selection.reading = "strict"  # the answer stands after ####; flexible: wherever the text ends
    c.selection.steps = "lines"  # what a step is: lines or sentences
    c.selection.per_problem = 0  # right chains of one problem at most; 0 keeps all
    c.selection.max_depth_share = 0.5  # of the kept chains, that one depth (1, 2, 3, 4, 5+) may have
    c.selection.tokenizer = str(BUNDLED_TEACHER)  # chains with words unknown to it are unparsable; its words are few

    c.output = ConfigDict()
    c.output.format = "jsonl"  # or parquet
    c.output.split = "train"  # name of the split in the shards' names
    c.output.rows_per_shard = 1_000  # chains
    return c
