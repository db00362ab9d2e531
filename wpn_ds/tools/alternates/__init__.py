"""Alternates (AltPO, arXiv 2409.13474): plausible other answers, by the starting model, to what it shall forget."""
