"""Choosing records before a training run, by what a model makes of them; rows are written as they were."""
