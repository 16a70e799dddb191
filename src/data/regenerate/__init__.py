"""`python -m data.regenerate`: lets the target rewrite the answers in a dataset."""
