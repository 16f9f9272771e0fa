"""What a model can do: chain and step accuracy by reasoning depth, answers, perplexity."""

from rtd_jax.evaluation.chains import ChainScore, score_chain
from rtd_jax.evaluation.estimates import Estimate, by_depth, estimate
from rtd_jax.evaluation.evaluate import EvaluationReport, evaluate_model
from rtd_jax.evaluation.perplexity import Perplexity, perplexity
from rtd_jax.evaluation.scoring import TokenScores, score_chains, token_scores

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
