"""Chains of Llama-3-70B-Instruct on GSM8K, from a serving engine: what configs/rtd_8b.py trains on.

    vllm serve meta-llama/Meta-Llama-3-70B-Instruct --tensor-parallel-size 8       # or SGLang, or transformers serve
    python launch/traces.py --config=configs/traces_llama3_70b.py --workdir=traces/llama3_70b \
        --config.openai.base_url=http://gpu-host:8000/v1
    python launch/train.py --config=configs/rtd_8b.py --config.data.train.location=traces/llama3_70b

The article trains on 50,000 chains of the teacher and says neither how they were drawn nor how they were chosen; what
stands here is ours. 8 chains of GSM8K's 7,473 training problems are 59,784. Not run by us at this size.
"""

from ml_collections import ConfigDict

from rtd_jax.apps.traces.traces import TracesRecipe
from rtd_jax.base.settings import defaults

INSTRUCTION = (
    "{prompt}\n\nSolve this step by step. Write each step as one sentence on a line of its own, without headings, "
    "bullets or blank lines. Then write a last line with the final answer alone, in the form '#### 42'."
)


def get_config() -> ConfigDict:
    c = defaults(TracesRecipe)
    c.problems.schema = "gsm8k"  # or math, strategyqa, arc: the answer's kind decides how it is checked
    c.problems.location = "openai/gsm8k"  # hub name, or a folder with train.jsonl
    c.problems.subset = "main"  # the hub's configuration name
    c.text.prompt_template = INSTRUCTION  # the user's message
    c.sampling.samples = 8  # chains of each problem: 59,784 are asked for, since the article has 50,000 chains

    c.backend = "openai"  # openai: a server of OpenAI's completions API; jax: a teacher in this process
    c.openai.model = "meta-llama/Meta-Llama-3-70B-Instruct"  # as the server names it
    c.openai.concurrency = 64  # requests under way; the engine batches them
    c.openai.retries = 30  # up to 8 s apart: outlasts a restart of the engine of about 4 minutes
    c.jax.path = "meta-llama/Meta-Llama-3-70B-Instruct"  # Hugging Face folder or hub name

    c.selection.reading = "flexible"  # the answer is wherever the text ends
    c.selection.max_depth_share = 0.5  # of the kept chains, that one depth (1, 2, 3, 4, 5+) may have
    c.output.format = "parquet"  # for a data set of this size
    return c
