"""The parts from which recipes are made: each decides one thing about a layer."""
