"""Lists by age, status and metadata, on both databases, compared with filtering all jobs in Python."""

from collections.abc import Iterator
from itertools import product
from typing import Literal, get_args

import pytest

from testing.jobs import claim, create
from tests.support.databases import DATABASES, migrated_database
from tpo.core.status import Status
from tpo.db import connect
from tpo.jobs.outcomes import Outcome
from tpo.jobs.view import JobView
from tpo.store import Store

STATUSES: tuple[Status, ...] = get_args(Status)
METADATA: tuple[dict[str, str], ...] = ({}, {"a": "1"}, {"b": "2", "a": "1"}, {"a": "2"}, {"c": "1"})


@pytest.fixture(scope="module", params=DATABASES)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """Yield a store shared by all tests of this module, which do not change it."""
    with migrated_database(request.param, request, tmp_path_factory.mktemp("pages")) as url:
        engine = connect(url)
        yield Store(engine)
        engine.dispose()


@pytest.fixture(scope="module")
def jobs(store: Store) -> list[JobView]:
    """Return jobs of one tenant, the oldest first, created in between jobs of another tenant."""
    ids = []
    for number, metadata in enumerate([*METADATA, *METADATA, *METADATA]):
        create(store.for_tenant("other"), metadata=metadata)
        job_id = create(store, metadata=metadata)
        ids.append(job_id)
        if number % 3:
            lease, _ = claim(store, job_id)
            store.leases.finish(lease, Outcome("completed" if number % 2 else "failed"))
    return sorted((store.jobs.get(job_id) for job_id in ids), key=lambda job: job.id)


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("statuses", [[], ["completed"], ["queued", "failed", "queued"], ["paused"], [*STATUSES]])
@pytest.mark.parametrize("metadata", METADATA)
def test_page_matches_filtered_list(
    store: Store, jobs: list[JobView], order: Literal["asc", "desc"], statuses: list[Status], metadata: dict[str, str]
) -> None:
    ordered = jobs if order == "asc" else jobs[::-1]
    matching = [
        job.id
        for job in ordered
        if (not statuses or job.status in statuses) and metadata.items() <= job.metadata.items()
    ]
    for after, limit in product((None, ordered[0].id, ordered[7].id, ordered[-1].id), (1, 4, 99)):
        expected = [i for i in matching if after is None or (i > after if order == "asc" else i < after)]
        found = store.jobs.page(limit=limit, after=after, order=order, statuses=statuses, metadata=metadata)
        assert [job.id for job in found] == expected[:limit]
