"""Raw data -> shards -> compiled order -> packed batches. Knows nothing of the trainer."""
