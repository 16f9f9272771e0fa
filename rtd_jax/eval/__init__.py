"""What a model can do: chain and step accuracy by reasoning depth, answers, perplexity."""

from rtd_jax.eval.chains import ChainScore, score_chain
from rtd_jax.eval.estimates import Estimate, by_depth, estimate
from rtd_jax.eval.evaluate import EvaluationReport, evaluate_model
from rtd_jax.eval.perplexity import Perplexity, perplexity
from rtd_jax.eval.scoring import TokenScores, score_chains, token_scores

__all__ = [
    "ChainScore",
    "Estimate",
    "EvaluationReport",
    "Perplexity",
    "TokenScores",
    "by_depth",
    "estimate",
    "evaluate_model",
    "perplexity",
    "score_chain",
    "score_chains",
    "token_scores",
]
