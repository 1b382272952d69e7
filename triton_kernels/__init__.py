"""Triton kernels, one module per core. Importing this package does not import triton."""
