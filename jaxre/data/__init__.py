"""Text to device: chat template and supervised span, packing plan, token cache, loader."""
