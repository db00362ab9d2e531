"""The run: processes, the step, the loop, checkpoints, telemetry. What is DeepSpeed's way stays in this folder."""
