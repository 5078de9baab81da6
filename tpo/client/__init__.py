"""The Python client: jobs over HTTP, with retries that never make a job twice."""

from tpo.client.batch import Result
from tpo.client.client import Client
from tpo.client.errors import (
    APIError,
    AuthenticationFailed,
    ClientError,
    Conflict,
    InvalidRequest,
    JobUnsuccessful,
    NotThere,
    RateLimited,
    ServerFailed,
    Unreachable,
    WaitedTooLong,
)
from tpo.client.types import TERMINAL, Candidate, Event, Iteration, Job, Status

__all__ = [
    "TERMINAL",
    "APIError",
    "AuthenticationFailed",
    "Candidate",
    "Client",
    "ClientError",
    "Conflict",
    "Event",
    "InvalidRequest",
    "Iteration",
    "Job",
    "JobUnsuccessful",
    "NotThere",
    "RateLimited",
    "Result",
    "ServerFailed",
    "Status",
    "Unreachable",
    "WaitedTooLong",
]
