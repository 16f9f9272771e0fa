"""What an evaluation needs, tried out before the training that it ends."""

from collections.abc import Mapping, Sequence

from rtd_jax.data.formats import render, stop_token_ids
from rtd_jax.data.tokenizer_match import vocab_size
from rtd_jax.data.trace import Trace
from rtd_jax.eval.chains import score_texts
from rtd_jax.eval.decoding import GenerateSettings
from rtd_jax.eval.evaluate import ChainEvaluator
from rtd_jax.eval.metrics import make_report
from rtd_jax.models.config import DecoderConfig


def check_evaluation(
    evaluator: ChainEvaluator, problems: Sequence[Trace], models: Mapping[str, DecoderConfig], key: str
) -> None:
    """Goes through an evaluation of models by name, without running one: their references stand for what they write.

    Args:
      key: of the settings that hold max_new_tokens: "evaluation.".

    Raises:
      ValueError: there are no problems, one cannot be asked or scored, or the settings do not fit a model.
    """
    decoding, tokenizer = evaluator.decoding, evaluator.tokenizer
    if not problems:
        raise ValueError("no test problem is left for the evaluation; raise its problems_per_depth, or add data")
    ends = stop_token_ids(tokenizer, evaluator.text)
    GenerateSettings(decoding.max_new_tokens, ends, vocab_size(tokenizer), decoding.batch_size)  # checks them
    for name, config in models.items():
        if decoding.max_new_tokens > config.max_positions:
            raise ValueError(
                f"{key}max_new_tokens is {decoding.max_new_tokens}, but the {name} has {config.max_positions} "
                f"positions (max_position_embeddings); use less"
            )
    texts = [render(tokenizer, trace.prompt, trace.completion, evaluator.text) for trace in problems]
    prompts = tokenizer([text.prompt for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
    for trace, prompt in zip(problems, prompts, strict=True):
        if not prompt:
            raise ValueError(f"{trace.source}: its prompt has no tokens; leave the row out")
    make_report(score_texts(problems, [[trace.completion] for trace in problems]), evaluator.open_from)
