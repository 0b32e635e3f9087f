"""The loop, its workloads and hooks."""
