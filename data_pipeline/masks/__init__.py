"""What a run leaves out, as one byte per sample beside the shards: filters, duplicates, lists of uids; torch-free."""
