"""Names of the queues of the broker."""

from tpo.broker import queue_name


def test_queue_name_is_unique_per_policy() -> None:
    models = ["demo", "org/model", "org_model", "org model", "./org/model", "org/model-8B", "a" * 300]
    assert len({queue_name(model) for model in models}) == len(models)


def test_queue_name_keeps_plain_model_name() -> None:
    assert queue_name("Qwen3-0.6B") == "tpo.jobs.Qwen3-0.6B"
    assert queue_name("Qwen/Qwen3-0.6B").startswith("tpo.jobs.Qwen_Qwen3-0.6B-")
