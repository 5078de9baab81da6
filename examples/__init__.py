"""Small programs that show how to use TPO. Each is run by a test."""
