"""Training: the run's config, the loop, the optimizers, and what a run folder holds."""
