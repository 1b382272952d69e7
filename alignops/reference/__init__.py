"""Plain PyTorch definitions of every operation. Tests compare with them; nothing falls back to them."""
