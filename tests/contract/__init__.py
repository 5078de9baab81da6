"""One suite for every implementation: databases and back ends."""
