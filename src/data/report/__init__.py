"""`python -m data.report`: statistics of the training data before a GPU is paid for."""
