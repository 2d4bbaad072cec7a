"""Passes over the prompts: outputs and timings, kept in a journal, alone or over several processes."""
