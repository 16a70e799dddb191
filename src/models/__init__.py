"""The method as tensors in, tensors out: target pass, draft, objectives, decoding, export. Needs torch and transformers."""
