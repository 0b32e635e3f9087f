"""Distributed pretraining of Janus-style unified multimodal models."""

__version__ = "0.1.0"
