"""Reward files: validation, the settings of each part, and the documented examples."""

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from testing.fakes import proceed
from tests.support.rewards import FakeJudge, FixedReward, load_reward_file, score_request
from tpo.backends import load_reward
from tpo.backends.rewards.combined import load_combined
from tpo.backends.spec import ModelSpec, RewardSpec
from tpo.core.errors import (
    ModelRefusedError,
)
from tpo.core.ports import RewardModel
from tpo.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "part: is required"),
        ("part = [", "is not valid TOML"),
        ("part = []", "part: .*at least 1"),
        ('[[part]]\nname = "a"\nkind = "lenght"\nmost = 1', r"part\[0\].*'lenght'.*'length'"),
        ('[[part]]\nname = "a"\nkind = "length"', r"part\[0\].length.most: is required"),
        ('[[part]]\nname = "a"\nkind = "length"\nmost = 1\nleast = 2', "least must not be above most"),
        ('[[part]]\nname = "a"\nkind = "length"\nmost = 1\nheavy = 2', r"heavy: is not a known field"),
        ('[[part]]\nname = "a"\nkind = "length"\nmost = 1\nweight = nan', r"weight: .*finite"),
        ('[[part]]\nname = "A b"\nkind = "length"\nmost = 1', r"part\[0\].length.name"),
        ('[[part]]\nname = "a"\nkind = "length"\nmost = 1\n' * 2, "part names must be unique; used more than once: a"),
        ("[[part]]\nname = 'a'\nkind = 'regex'\npattern = '('", "pattern: is not a regular expression"),
        ("[[part]]\nname = 'a'\nkind = 'json'\nschema = {type = 'objct'}", "schema: is not a JSON schema"),
        ("[[part]]\nname = 'a'\nkind = 'model'\nmodel = 'vllm:m'", "url belongs to"),
        ("[[part]]\nname = 'a'\nkind = 'model'\nmodel = 'vllm:m'\nurl = 'host'", "url must start with http"),
        ("[[part]]\nname = 'a'\nkind = 'model'\nmodel = 'vllm:m'\nurl = 'http://h'\nkey = 'k'", "TPO_SERVER_API_KEYS"),
        ("[[part]]\nname = 'a'\nkind = 'judge'\npolicy = 'openai:m'", "url belongs to"),
        ("[[part]]\nname = 'a'\nkind = 'judge'\nlowest = 3\nhighest = 3", "lowest must be below highest"),
        ("[[part]]\nname = 'a'\nkind = 'judge'\nsamples = 3", "need a temperature above 0"),
        ("[[part]]\nname = 'a'\nkind = 'judge'", "but this process has no policy"),
        ("[[part]]\nname = 'a'\nkind = 'plugin'\nplugin = 'nope'", "No installed package offers the reward nope"),
        ("[[part]]\nname = 'a'\nkind = 'model'\nmodel = '/no/such/folder'", "There is no folder"),
    ],
)
def test_reward_file_errors_name_the_cause(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ModelRefusedError, match=message):
        load_reward_file(tmp_path, text)


REMOTE_PARTS = """
[[part]]
name = "quality"
kind = "model"
model = "vllm-pooling:m"
url = "http://rewards"
key = "rewards"
task = "token_classify"
tokenizer = "there"
bounded = true

[[part]]
name = "judge"
kind = "judge"
policy = "openai:j"
url = "http://judge/v1"
limit_name = "max_completion_tokens"
extra_body = {top_k = 20}
"""


def test_reward_part_uses_only_settings_of_its_file(tmp_path: Path) -> None:
    own = Settings(
        openai_url="http://own/v1",
        openai_api_key="of the policy's own server",
        openai_samples="separate",
        openai_extra_body={"min_p": 0.1},
        reward_api_key="of another server",
        server_api_keys={"rewards": "of the rewards' server"},
    )
    loaded: list[ModelSpec | RewardSpec] = []
    first = FixedReward(1)

    def load_part_reward(spec: RewardSpec, _settings: Settings) -> RewardModel:
        loaded.append(spec)
        return first

    def load_part_policy(spec: ModelSpec, _settings: Settings) -> Any:
        loaded.append(spec)
        return FakeJudge(lambda _request, _sample: "")

    (file := tmp_path / "reward.toml").write_text(REMOTE_PARTS)
    load_combined(file, own, load_part_reward, load_part_policy, None)
    assert loaded == [
        RewardSpec(
            "vllm-pooling:m",
            "http://rewards",
            SecretStr("of the rewards' server"),
            task="token_classify",
            tokenizer="there",
            in_unit_interval=True,
        ),
        ModelSpec("openai:j", "http://judge/v1", max_tokens_field="max_completion_tokens", extra_body={"top_k": 20}),
    ]

    def refuse(_spec: ModelSpec, _settings: Settings) -> Any:
        raise ModelRefusedError("no")

    with pytest.raises(ModelRefusedError, match="no"):
        load_combined(file, own, load_part_reward, refuse, None)
    assert first.closed
    loaded.clear()
    file.write_text(REMOTE_PARTS + 'key = "nobody"\n')
    with pytest.raises(ModelRefusedError, match="needs the key nobody"):
        load_combined(file, own, load_part_reward, load_part_policy, None)
    assert not loaded


def test_missing_reward_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelRefusedError, match=r"none\.toml cannot be read"):
        load_reward(Settings(reward_model="q", reward_file=tmp_path / "none.toml"))


def documented(language: str) -> list[str]:
    """Return the code blocks of a language in the page on rewards."""
    blocks = (ROOT / "docs" / "rewards.md").read_text().split("```")[1::2]
    return [block.removeprefix(language).lstrip("\n") for block in blocks if block.startswith(f"{language}\n")]


def test_documented_plugin_loads_once_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = documented("python")
    assert len(code.splitlines()) <= 20
    (tmp_path / "kindness.py").write_text(code)
    info = tmp_path / "kindness-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kindness\nVersion: 1.0\n")
    (entry,) = [block for block in documented("toml") if "tpo.rewards" in block]
    name, _, target = entry.splitlines()[-1].partition(" = ")
    (info / "entry_points.txt").write_text(f"[tpo.rewards]\n{name} = {json.loads(target)}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (part,) = [block for block in documented("toml") if 'kind = "plugin"' in block]
    reward = load_reward_file(tmp_path, part)
    rewards = reward.score(score_request("Thank you, please.", "No."), proceed)
    assert rewards.values[0] > rewards.values[1]
    with pytest.raises(ModelRefusedError, match=r"plug-in kindness cannot be created: TypeError"):
        load_reward_file(tmp_path, f'[[part]]\nname = "a"\nkind = "plugin"\nplugin = "{name}"\noptions = {{wrong = 1}}')
    monkeypatch.setattr(sys.modules["kindness"], "Kindness", dict)
    with pytest.raises(ModelRefusedError, match="has no method score"):
        load_reward_file(tmp_path, part)
    sys.modules.pop("kindness")


def test_documented_reward_files_are_valid(tmp_path: Path) -> None:
    from tpo.backends.rewards.config import read_reward_file

    files = [block for block in documented("toml") if "[[part]]" in block]
    assert len(files) >= 3
    kinds = set()
    for text in files:
        file = tmp_path / "reward.toml"
        file.write_text(textwrap.dedent(text))
        kinds |= {part.kind for part in read_reward_file(file).part}
    assert kinds == {"model", "judge", "length", "regex", "json", "plugin"}
