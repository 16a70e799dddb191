"""Conversations to packed rows: chat template, supervision, tokenisation, packing, anchors."""
