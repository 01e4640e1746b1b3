"""Packed layers, and how a model gets them."""
