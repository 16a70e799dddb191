"""`python -m data.regenerate`: the target answers the prompts of a data set."""
