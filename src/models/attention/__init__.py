"""Attention over packed rows and mask blocks: mask rules, kernels, and the loop over decoder layers."""
