"""Calibration: the denoiser's inputs along real trajectories, cut into rows, kept within a budget, and cached."""
