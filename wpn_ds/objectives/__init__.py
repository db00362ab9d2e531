"""Unlearning objectives, one a file: their flags, and the terms that they make. No torch until a loss is computed."""
