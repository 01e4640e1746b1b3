"""The denoiser's inputs along real trajectories: captured, cut into rows, budgeted, cached."""
