"""Evaluation by real decoding: acceptance length, losslessness, throughput, tables and plots."""
