"""What asks why: ceilings, orders, baselines, judges, traces, and whether a difference is noise."""
