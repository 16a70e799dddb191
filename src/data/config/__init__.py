"""Configuration: composition of conf/ and validation of keys, types and ranges."""
