"""Composes the configuration from conf/ and validates its keys, types and ranges."""
