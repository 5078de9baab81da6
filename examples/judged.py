"""Show how a judge's part of the reward changes the choice.

python -m examples.judged
"""

import os

from tpo.client import Client

MESSAGE = "I want a quick refund. My telescope is now scratched. I paid a lot for it. Best, Kofi"


def main() -> None:
    """Submit a job whose reward has two parts, and print them for each candidate, the best first."""
    url, key = os.environ.get("TPO_URL", "http://127.0.0.1:8000"), os.environ.get("TPO_API_KEY")
    with Client(url, key) as client:
        parameters = {"reward_model": "judged", "sample_size": 4, "max_iterations": 1, "seed": 1}
        job = client.wait(client.submit(MESSAGE, parameters=parameters))
        candidates = [each for each in client.candidates(job) if each["reward"] is not None]
        for candidate in sorted(candidates, key=lambda each: -(each["reward"] or 0.0)):
            parts = ", ".join(f"{part['name']} {part['value']:.1f}" for part in candidate["parts"])
            print(f"{candidate['reward']:6.2f} = {parts}: {candidate['text']}")


if __name__ == "__main__":
    main()
