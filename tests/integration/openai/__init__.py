"""Tests with the `openai` client."""
