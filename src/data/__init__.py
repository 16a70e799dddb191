"""From conversations to batches: records, tokens, packed rows, anchors. Knows nothing of models."""
