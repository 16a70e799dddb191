"""`python -m data.report`: reports training data statistics before training."""
