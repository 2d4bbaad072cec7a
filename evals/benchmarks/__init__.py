"""Public tasks: where their data lie, what a model answers, and lm-eval's harness."""
