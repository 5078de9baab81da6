"""Make preference pairs for training (DPO and similar) from the candidates of each job.

python -m examples.preference_pairs examples/messages.jsonl > pairs.jsonl
"""

import json
import os
import sys

from tpo.client import Candidate, Client

SMALLEST_MARGIN = 1.0
"""Pairs whose rewards differ by less teach more noise than preference."""


def pair(candidates: list[Candidate]) -> tuple[Candidate, Candidate] | None:
    """Return the best and the worst candidate, or None if they are too close. Unusable ones have no reward."""
    ranked = sorted((each for each in candidates if each["reward"] is not None), key=lambda each: each["reward"] or 0.0)
    if not ranked or (ranked[-1]["reward"] or 0.0) - (ranked[0]["reward"] or 0.0) < SMALLEST_MARGIN:
        return None
    return ranked[-1], ranked[0]


def main() -> None:
    """Print one pair for each message, in the format that trainers read: prompt, chosen and rejected."""
    url, key = os.environ.get("TPO_URL", "http://127.0.0.1:8000"), os.environ.get("TPO_API_KEY")
    with open(sys.argv[1], encoding="utf-8") as file, Client(url, key) as client:
        messages = [json.loads(line)["message"] for line in file]
        parameters = {"sample_size": 4, "max_iterations": 1, "seed": 1}
        for result in client.batch(messages, parameters=parameters):
            if result.job is None:
                print(result.error, file=sys.stderr)
            elif found := pair(client.candidates(result.job)):
                chosen, rejected = found
                print(json.dumps({"prompt": result.row, "chosen": chosen["text"], "rejected": rejected["text"]}))


if __name__ == "__main__":
    main()
