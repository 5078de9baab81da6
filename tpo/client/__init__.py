"""The Python client: jobs over HTTP, with retries that never create a job twice."""

from tpo.client.batch import Result
from tpo.client.client import Client
from tpo.client.errors import (
    APIConnectionError,
    APIError,
    AuthenticationError,
    BadRequestError,
    ClientError,
    ConflictError,
    InternalServerError,
    JobFailedError,
    NotFoundError,
    RateLimitError,
    WaitTimeoutError,
)
from tpo.client.types import TERMINAL, Candidate, Event, Iteration, Job, JobSummary, Status

__all__ = [
    "TERMINAL",
    "APIConnectionError",
    "APIError",
    "AuthenticationError",
    "BadRequestError",
    "Candidate",
    "Client",
    "ClientError",
    "ConflictError",
    "Event",
    "InternalServerError",
    "Iteration",
    "Job",
    "JobFailedError",
    "JobSummary",
    "NotFoundError",
    "RateLimitError",
    "Result",
    "Status",
    "WaitTimeoutError",
]
