"""From planned rows to batches: read, decode, assemble, load."""
