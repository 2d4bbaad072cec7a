"""What compares ways of training: variants, clipped times, and the cost of a step."""
