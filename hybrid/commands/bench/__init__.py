"""What `hybrid bench` times on this machine."""
