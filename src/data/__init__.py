"""The data pipeline, from conversations to batches: records, tokens, packed rows, anchors. Independent of `models`."""
