"""`python -m data.report`: training data statistics, computed before training."""
