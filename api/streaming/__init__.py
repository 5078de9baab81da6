"""Event streams and long polling."""
