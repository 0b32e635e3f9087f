"""From files people have to shards and their index: offline, restartable, torch-free."""
