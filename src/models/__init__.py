"""FlexDraft on tensors: target pass, drafter, losses, decoding and export. Depends on torch and transformers."""
