"""The value that recipes end at: per layer, which format, scales and codes."""
