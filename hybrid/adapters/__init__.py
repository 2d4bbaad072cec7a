"""What is trained beside a model's own weights: low-rank maps, and heads on drafts."""
