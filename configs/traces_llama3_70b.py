"""Chains of Llama-3-70B-Instruct on GSM8K, from a serving engine: what configs/rtd_8b.py trains on.

    vllm serve meta-llama/Meta-Llama-3-70B-Instruct --tensor-parallel-size 8       # or SGLang, or transformers serve
    python launch/traces.py --config=configs/traces_llama3_70b.py --workdir=traces/llama3_70b \
        --config.openai.base_url=http://gpu-host:8000/v1
    python launch/train.py --config=configs/rtd_8b.py --config.data.train.location=traces/llama3_70b

The article trains on 50,000 chains of the teacher and says neither how they were drawn nor how they were chosen; what
stands here is ours. 8 chains of GSM8K's 7,473 training problems are 59,784. Not run by us at this size.
"""

from ml_collections import ConfigDict

INSTRUCTION = (
    "{prompt}\n\nSolve this step by step. Write each step as one sentence on a line of its own, without headings, "
    "bullets or blank lines. Then write a last line with the final answer alone, in the form '#### 42'."
)


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.problems = ConfigDict()
    c.problems.schema = "gsm8k"  # or math, strategyqa, arc: the answer's kind decides how it is checked
    c.problems.location = "openai/gsm8k"  # hub name, or a folder with train.jsonl
    c.problems.subset = "main"  # the hub's configuration name
    c.problems.split = "train"  # never the split that students are tested on
    c.problems.limit = 0  # problems; 0 takes all

    c.text = ConfigDict()
    c.text.kind = "chat"  # the server applies the model's own chat template
    c.text.prompt_template = INSTRUCTION  # the user's message

    c.sampling = ConfigDict()
    c.sampling.samples = 8  # chains of each problem
    c.sampling.temperature = 0.7  # 0 is greedy
    c.sampling.top_p = 0.95  # smallest set of ids that reaches this probability; 1 keeps all
    c.sampling.max_tokens = 512  # of a chain; what reaches it is unfinished
    c.sampling.stop = ()  # texts that end a chain
    c.sampling.seed = 0  # each request has its own, made from this

    c.backend = "openai"  # openai: a server of OpenAI's completions API; jax: a teacher in this process
    c.openai = ConfigDict()
    c.openai.base_url = "http://localhost:8000/v1"  # of the server
    c.openai.model = "meta-llama/Meta-Llama-3-70B-Instruct"  # as the server names it
    c.openai.api_key_variable = "OPENAI_API_KEY"  # environment variable; unset where no key is needed
    c.openai.concurrency = 64  # requests under way; the engine batches them
    c.openai.requests_per_minute = 0  # started at most; 0 is no limit
    c.openai.timeout = 600.0  # seconds for one reply
    c.openai.retries = 30  # up to 8 s apart: outlasts a restart of the engine of about 4 minutes
    c.openai.extra_body = ""  # further fields of a request as a JSON object, such as '{"top_k": 50}'
    c.openai.skip_refused = False  # count a request that the server refuses instead of stopping

    c.jax = ConfigDict()
    c.jax.path = "meta-llama/Meta-Llama-3-70B-Instruct"  # Hugging Face folder or hub name
    c.jax.param_dtype = "bfloat16"  # of the weights in memory; int8 halves them
    c.jax.compute_dtype = "bfloat16"  # of matrix products and states
    c.jax.sharding = "tensor"  # what travels between devices: the activations
    c.jax.batch_size = 64  # chains written at one time; what a kill can cost at most

    c.selection = ConfigDict()
    c.selection.reading = "flexible"  # strict: the answer stands after ####; flexible: wherever the text ends
    c.selection.steps = "lines"  # what a step is: lines or sentences
    c.selection.per_problem = 0  # right chains of one problem at most; 0 keeps all
    c.selection.max_depth_share = 0.5  # of the kept chains, that one depth (1, 2, 3, 4, 5+) may have
    c.selection.tokenizer = ""  # chains with tokens unknown to it are unparsable; a byte-pair tokenizer knows all

    c.output = ConfigDict()
    c.output.format = "parquet"  # jsonl or parquet
    c.output.split = "train"  # name of the split in the shards' names
    c.output.rows_per_shard = 10_000  # chains
    return c
