"""Batch normalisation: layers on stacked batches, running statistics, several processes, fused residual blocks."""
