"""Ways to train the same thing, measured against each other: ``make bench`` runs all rows and writes ``results.json``.

Each way is a process of its own, so that its peak memory is its own; the driver lets them take turns, step by step.
``gpu``, ``tofu`` and ``result`` are commands of their own: a GPU's speed, TOFU's facts, a model of OPT-125m's shape.
"""
