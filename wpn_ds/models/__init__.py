"""Causal language models: loading under ZeRO-3, reading packed rows, and the check that they read them exactly."""
