"""Records -> token segments -> rows -> the step's micro-batches. Neither deepspeed nor transformers is imported here."""
