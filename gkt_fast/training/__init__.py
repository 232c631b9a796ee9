"""The training loop around `GKT`: steps, epochs, checkpoints, logs."""
