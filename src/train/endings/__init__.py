"""Early termination: signals, non-finite steps, errors agreed on by all ranks."""
