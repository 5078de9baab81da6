"""Tests of remote back ends."""
