"""Speculative decoding of whole batches that says what the target alone would say."""
