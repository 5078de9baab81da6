"""Tests of the engine and of local models."""
