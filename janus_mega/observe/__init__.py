"""What a run tells about itself: logs, progress, metrics, throughput, memory. Decides nothing."""
