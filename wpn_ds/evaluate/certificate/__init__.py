"""The durability certificate: attacks on what a model has unlearned, each with n and interval, on one page."""
