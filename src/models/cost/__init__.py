"""Analytical FLOPs and memory of a run, and GPU specifications. Needs no torch."""
