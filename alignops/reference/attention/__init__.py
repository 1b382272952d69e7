"""Definition of attention over shared cache blocks: rotary positions, the operator."""
