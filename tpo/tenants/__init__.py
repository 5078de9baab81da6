"""Tenants: API keys, limits and idempotency keys."""
