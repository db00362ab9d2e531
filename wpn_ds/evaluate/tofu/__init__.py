"""TOFU's metrics of unlearned facts: data (files) -> metrics (equations, figures) -> a model's answers, and the task.

TOFU is arXiv 2401.06121; forget utility and cleanness indistinguishability are AltPO's (arXiv 2409.13474).
"""
