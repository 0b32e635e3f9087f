"""Training checkpoints, and conversions to and from other formats: knows slices and files, nothing of engines."""
