"""Early termination: signals, non-finite values, and errors raised on all ranks at the same step."""
