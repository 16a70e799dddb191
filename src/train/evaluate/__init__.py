"""Evaluation by decoding: acceptance length, losslessness and throughput, with tables and plots."""
