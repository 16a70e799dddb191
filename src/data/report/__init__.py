"""`python -m data.report`: reports statistics of the training data before training."""
