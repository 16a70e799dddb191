"""`python -m data.regenerate`: regenerates the answers in a dataset with the target."""
