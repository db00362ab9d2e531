"""The mathematics of losses: pure torch, nothing of a batch, a rank or a model. Sums are fp32, whatever the type."""
