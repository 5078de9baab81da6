"""The cost of a statement in query plans, rows read and machine steps, which do not depend on the clock."""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, event, inspect

SMALL_TABLES = {"workers", "alembic_version", "queues", "last_claims"}
"""Tables with one row for each live process, policy or queue; they may be read whole."""

SMALL_INDEXES = {"jobs_running", "jobs_in_quarantine"}
"""Indexes of the running jobs and of those that a dead worker ran, one for each slot; they may be read whole."""


class Statement(NamedTuple):
    """A statement as it was passed to the driver."""

    sql: str
    values: Any


@contextlib.contextmanager
def recorded(engine: Engine) -> Iterator[list[Statement]]:
    """Yield the list of the statements executed within the block. Of executemany, only the first row is recorded."""
    found: list[Statement] = []

    def record(_c: Any, _cursor: Any, sql: str, values: Any, _context: Any, executemany: bool) -> None:
        if sql.lstrip().upper().startswith(("SELECT", "INSERT", "UPDATE", "DELETE", "WITH")):
            found.append(Statement(sql, values[0] if executemany else values))

    event.listen(engine, "before_cursor_execute", record)
    try:
        yield found
    finally:
        event.remove(engine, "before_cursor_execute", record)


def scans(engine: Engine, statement: Statement) -> list[str]:
    """Return the steps of a statement's plan that read a whole table or index."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement.sql}", statement.values).all()
            # A name that is not in the schema is a list of values, or a subquery that has its own plan.
            names = set(inspect(connection).get_table_names())
            found = (re.match(r"SCAN (\w+)", row[3]) for row in rows)
            # An alias may stand for a table: aliases end with a number.
            return [m.string for m in found if m and re.sub(r"_\d+$", "", m[1]) in names and not _small(m.string)]
        connection.exec_driver_sql("SET LOCAL enable_seqscan = off")  # small tables would be scanned
        return [_named(node) for node in _nodes(_explained(connection, "", statement)) if _reads_all(node)]


def rows_read(engine: Engine, statement: Statement) -> int:
    """Return the number of rows that PostgreSQL reads from tables and indexes for a query."""
    with engine.connect() as connection:
        connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        nodes = [n for n in _nodes(_explained(connection, "ANALYZE, ", statement)) if n["Node Type"].endswith("Scan")]
    return sum(
        int(node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)))
        for node in nodes
        if node.get("Relation Name", "") not in SMALL_TABLES
    )


@contextlib.contextmanager
def counted_steps(engine: Engine) -> Iterator[list[int]]:
    """Yield a one-item list with the steps of SQLite's virtual machine within the block.

    Steps of triggers and cascades are included.
    """
    steps = [0]

    def step() -> int:
        steps[0] += 1
        return 0

    def watch(connection: Connection) -> None:
        connection.connection.driver_connection.set_progress_handler(step, 1)  # type: ignore[union-attr]

    event.listen(engine, "begin", watch)
    try:
        yield steps
    finally:
        event.remove(engine, "begin", watch)
        engine.dispose()


def _explained(connection: Connection, options: str, statement: Statement) -> dict[str, Any]:
    answer = connection.exec_driver_sql(
        f"EXPLAIN ({options}FORMAT JSON) {statement.sql}", statement.values
    ).scalar_one()
    plan: dict[str, Any] = (json.loads(answer) if isinstance(answer, str) else answer)[0]["Plan"]
    return plan


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from _nodes(child)


def _reads_all(node: dict[str, Any]) -> bool:
    if node.get("Relation Name") in SMALL_TABLES or node.get("Index Name") in SMALL_INDEXES:
        return False
    kind = node["Node Type"]
    return kind == "Seq Scan" or ("Index" in kind and "Scan" in kind and "Index Cond" not in node)


def _named(node: dict[str, Any]) -> str:
    return " ".join(str(node[key]) for key in ("Node Type", "Relation Name", "Index Name") if key in node)


def _small(step: str) -> bool:
    words = step.split()
    return words[1] in SMALL_TABLES or words[-1] in SMALL_INDEXES
