"""Ranks, groups, megatron state, gradients of replicated parameters: how a job is cut, and nothing of models."""
