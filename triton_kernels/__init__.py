"""Triton kernels of alignops, one module per core. Importing this package does not import triton."""
