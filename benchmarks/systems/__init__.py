"""One module per measured system; each runs in its own process and environment and speaks `protocol`."""
