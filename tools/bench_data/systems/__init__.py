"""One module per loader that is measured; each is imported in its own environment only."""
