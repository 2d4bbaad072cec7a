"""What can be learned beside the joint objective, drafters and rewards, and what objectives are made of."""
