"""The mathematics: pure torch, no deepspeed, no transformers. All of it computes in fp32 whatever the model's type."""
