"""Directories of transformers' own Janus classes: writing them, reading them, and the names and settings in between."""
