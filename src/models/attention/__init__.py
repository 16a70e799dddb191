"""Attention of packed rows and of mask blocks: mask rules, kernels, and the loop over decoder layers."""
