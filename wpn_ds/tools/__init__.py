"""Commands beside training and evaluation, one a module or a folder."""
