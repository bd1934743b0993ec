"""The GenRec model, its layers, losses and optimizers."""
