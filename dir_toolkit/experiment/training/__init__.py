"""Training loops, checkpoints, logs and searches for settings."""
