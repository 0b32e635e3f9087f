"""A training step beside transformers' Janus under torch's AdamW: same weights, same documents, same losses."""
