"""What `hybrid eval` measures of a model: one file a command, and what several of them share."""
