"""Tests that take seconds: no servers, no models."""
