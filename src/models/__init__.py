"""The FlexDraft method on tensors: target pass, draft, losses, decoding, export. Needs torch and transformers."""
