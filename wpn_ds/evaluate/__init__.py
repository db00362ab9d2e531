"""What a model answers, judged: generation, the reference judge, harmless rates, retain perplexity and the report."""
