"""What a job tells of itself: logs, pictures, samples and predictions."""
