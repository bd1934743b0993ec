"""Training: set-up, the loop, engines and checkpoints."""
