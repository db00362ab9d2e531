"""wpn_ds: a distributed trainer that makes language models unlearn harmful behaviour."""

__version__ = "0.1.0"
