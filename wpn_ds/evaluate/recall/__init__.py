"""What a model says of texts that it was to forget, and of others: data (files) -> task (answers, figures).

MUSE is arXiv 2407.06460, RWKU arXiv 2406.10890.
"""
