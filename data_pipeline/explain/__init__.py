"""Looking into shards, plans and runs: what is there, what is damaged, what trained when."""
