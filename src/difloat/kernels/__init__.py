"""Computation of quantized layers: operator schemas, the reference that defines their results, and faster backends."""
