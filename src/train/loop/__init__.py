"""Training loop of one stage under Lightning: modules, batches, ZeRO, decoding during validation, logging."""
