"""What a model can do: chain and step accuracy by reasoning depth, answers, perplexity, drift."""
