"""Preprocessing from conversations to packed rows: chat template, supervision, tokenization, packing, anchors."""
