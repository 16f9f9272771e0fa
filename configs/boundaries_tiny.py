"""How the bundled classifier of the bundled tiny teacher was made.

    python launch/boundaries.py --config=configs/boundaries_tiny.py

The generator's problems, their lines joined by spaces; the teacher was trained on lines only. Takes some minutes on two
cores. docs/segmentation.md has the result; to bundle another one, copy runs/boundaries_tiny/classifier.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()

    c.teacher = ConfigDict()
    c.teacher.path = "rtd_jax/bundled/tiny_teacher"  # a Hugging Face folder or hub name
    c.teacher.param_dtype = "float32"  # of the weights in memory
    c.teacher.compute_dtype = "float32"  # of matrix products and states
    c.layers = (1, 2, 3, 4)  # whose states are read; 4 is the final normed state
    c.batch_size = 64  # rows that the teacher reads at one time
    c.states = "runs/boundary_states"  # folder that keeps hidden states

    c.train = _problems("train", 5_000)  # chains with annotated steps
    c.train_chains = 4_500  # the first by a hash of the prompt
    c.validation_chains = 500  # the next; epoch, calibration, threshold and minimum length are chosen on them
    c.text = ConfigDict()
    c.text.prompt_template = "Question: {prompt}\nAnswer:\n"  # what the tiny tokenizer is made for
    c.text.completion_prefix = ""  # between prompt and completion

    c.tests = ConfigDict()
    for name, form in (("synthetic", "plain"), ("synthetic_marked", "marked")):
        c.tests[name] = ConfigDict()
        c.tests[name].source = _problems("test", 600)  # held out
        c.tests[name].chains = 600  # all
        c.tests[name].form = form  # plain: no marks; marked: as it was

    c.head = ConfigDict()
    c.head.width = 32  # hidden units
    c.head.dilations = (1, 2)  # tokens to either side that a block reads
    c.head.dropout = 0.1  # of hidden units, while fitting

    c.fit = ConfigDict()
    c.fit.epochs = 4  # over the training chains
    c.fit.rows = 8  # of 512 tokens, per update
    c.fit.learning_rate = 2e-3  # peak
    c.fit.positive_weight = 3.0  # of a boundary in the loss; other words weigh 1
    c.fit.seed = 0  # of the head and the order of the data

    c.baselines = True  # also fit the head on token embeddings, on positions, and without neighbours
    c.examples = 6  # chains in the picture
    c.resamples = 1_000  # of chains, for 95% intervals
    return c


def _problems(split: str, limit: int) -> ConfigDict:
    source = ConfigDict()
    source.schema = "synthetic"  # the generator; its splits are disjoint
    source.split = split  # of the data set
    source.limit = limit  # problems
    source.depths = (1, 2, 3, 4, 5, 6)  # reasoning steps, equally often
    source.seed = 0  # of the generator
    return source
