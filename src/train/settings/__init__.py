"""Validation of the composed settings, and values derived from them, before anything is loaded."""
