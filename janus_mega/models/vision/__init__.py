"""The two visual pathways: understanding encoders and the VQ image tokenizer."""
