"""What the engine's probe and the evaluation share: judges that need no model, and the statistics of verdicts."""
