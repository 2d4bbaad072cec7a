"""What a job needs to run anywhere: processes, shards, formats, checkpoints, and going on after a stop."""
