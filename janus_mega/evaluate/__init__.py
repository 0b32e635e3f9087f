"""Judging what a trained model reads, draws and writes, item by item."""
