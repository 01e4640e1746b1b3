"""What computes a quantized layer: operator schemas, the reference that defines their results, and faster backends."""
