"""Which numbers exist, and the best ones for a tensor: formats, rounding, packing, search."""
