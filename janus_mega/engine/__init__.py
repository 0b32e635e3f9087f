"""The only door to DeepSpeed: chunks and micro-batches in, one optimizer step out."""
