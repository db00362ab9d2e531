"""A job's processes: how they were started, find each other, are told to stop, and what is left for the next start."""
