"""What compression costs in quality: exact runs over windows of a text, compared, explained and doubted."""
