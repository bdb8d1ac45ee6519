"""From a model and its data to checkpoints and logs."""
