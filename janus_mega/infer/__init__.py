"""Cached generation of text and images from a training checkpoint."""
