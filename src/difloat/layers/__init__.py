"""Quantized layers with packed weights, and how a model gets them."""
