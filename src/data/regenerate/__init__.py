"""`python -m data.regenerate`: regenerate the answers of a data set with the target."""
