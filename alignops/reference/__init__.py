"""Plain PyTorch definitions of every operation: what the tests compare with."""
