"""Batches: files of requests that become jobs, and their results."""
