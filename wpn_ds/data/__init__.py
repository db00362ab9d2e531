"""Records -> token segments -> rows -> the step's micro-batches. Imports neither deepspeed nor transformers."""
