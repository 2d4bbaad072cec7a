"""Likelihood, quality, speed, the frontier and its report."""
