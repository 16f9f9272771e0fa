"""What is wrong with a recipe's models and data, said before it is run."""
