"""What `alignops demo` runs: each core on a real model."""
