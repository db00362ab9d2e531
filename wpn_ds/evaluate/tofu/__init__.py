"""TOFU's metrics of unlearned facts: data (files) -> metrics (equations, figures) -> the task (answers).

TOFU is arXiv 2401.06121; forget utility and cleanness indistinguishability are AltPO's (arXiv 2409.13474).
"""
