"""How a run ends early: signals, non-finite steps, errors that all ranks agree on."""
