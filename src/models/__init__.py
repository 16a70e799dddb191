"""The tensor-level FlexDraft implementation: target pass, drafter, losses, decoding and export.

Depends on torch and transformers.
"""
