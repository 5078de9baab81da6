"""Fast tests that need no server and no model."""
