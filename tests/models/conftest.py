"""Fixtures of the tests in this folder."""

from helpers.wrapped_targets import root, twin  # noqa: F401
