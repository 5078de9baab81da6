"""Test-Time Preference Optimization as a durable service: the library.

Start with `core`, the pure algorithm. The features (`jobs`, `tenants`, `batches`, `webhooks`) keep its state in the
database through `db` and `store`. `backends` holds the models, `broker` notifies workers, `cli` holds the commands.
"""

__version__ = "0.1.0"
