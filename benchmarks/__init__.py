"""Benchmarks of alignops: `python -m benchmarks.report` from a source checkout."""
