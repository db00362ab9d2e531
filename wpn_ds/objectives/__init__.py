"""The mathematics: pure torch, no deepspeed, no transformers. Sums are fp32, whatever the model's type."""
