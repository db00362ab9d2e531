"""Ablations: the same training with one thing changed at a time, each model evaluated, in one table and one plot."""
