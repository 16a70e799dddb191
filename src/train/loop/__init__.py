"""One training stage under Lightning: modules, batches, ZeRO, validation by decoding, logging."""
