"""The method as tensors in, tensors out: target pass, draft, losses, decoding, export. Needs torch and transformers."""
