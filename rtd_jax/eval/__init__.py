"""What a model can do: chain and step accuracy by reasoning depth, answers, perplexity."""

from rtd_jax.eval.chains import ChainScore, score_chain
from rtd_jax.eval.estimates import Estimate, by_depth, estimate
from rtd_jax.eval.evaluate import ChainEvaluator, DecodingSettings, EvaluationReport
from rtd_jax.eval.scoring import ScoringSettings, TokenScores, score_chains, token_scores

__all__ = [
    "ChainEvaluator",
    "ChainScore",
    "DecodingSettings",
    "Estimate",
    "EvaluationReport",
    "ScoringSettings",
    "TokenScores",
    "by_depth",
    "estimate",
    "score_chain",
    "score_chains",
    "token_scores",
]
