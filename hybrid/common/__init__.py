"""What all four folders use: checks, whole files, names that are looked up late, and old names."""
