"""Lightning training loop for a stage: modules, batches, ZeRO, decoding during validation, logging."""
