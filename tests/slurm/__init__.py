"""On a real Slurm: several nodes in namespaces of this machine."""
