"""What may happen to a training run, done on purpose: ``fathom chaos`` counts what it survives."""
