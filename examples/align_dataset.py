"""Align a dataset: write an optimized answer for each of its messages.

python -m examples.align_dataset examples/messages.jsonl > aligned.jsonl
"""

import json
import os
import sys
from typing import Any

from tpo.client import Client


def body(row: dict[str, Any]) -> dict[str, Any]:
    """Return the job of a row. Its name makes the program repeatable: a second run finds the jobs of the first."""
    return {"input": row["message"], "external_id": f"aligned-{row['id']}"}


def main() -> None:
    """Print each row with its answer and reward, in the order of the file."""
    url, key = os.environ.get("TPO_URL", "http://127.0.0.1:8000"), os.environ.get("TPO_API_KEY")
    with open(sys.argv[1], encoding="utf-8") as file, Client(url, key) as client:
        rows = (json.loads(line) for line in file)  # read as jobs end, so the file can be of any size
        parameters = {"sample_size": 4, "max_iterations": 2, "seed": 1}
        for result in client.batch(rows, body, in_flight=16, parameters=parameters):
            if result.job is None or result.job["best"] is None:
                print(f"{result.row['id']}: {result.error}", file=sys.stderr)
                continue
            print(json.dumps({**result.row, "answer": result.output, "reward": result.job["best"]["reward"]}))


if __name__ == "__main__":
    main()
