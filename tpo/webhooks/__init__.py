"""Webhooks: endpoints, the outbox, signed deliveries and safe HTTP."""
