"""What runs here, and how fast."""
