"""Loading of models, and errors for models that cannot be loaded."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from testing.waiting import HANG_SECONDS
from tests.support.tiny_models import CONTEXT, save_capped, save_llama, save_reward
from tpo.backends import load_policy, load_reward_model
from tpo.backends.local.loader import load_policy_model, load_reward_classifier
from tpo.backends.spec import ModelSpec, RewardSpec
from tpo.core.errors import ModelRefusedError
from tpo.settings import Settings


def load_any_policy(name: str) -> Any:
    """Load a policy by its name alone."""
    return load_policy(ModelSpec(name), Settings())


def load_any_reward(name: str) -> Any:
    """Load a reward model by its name alone."""
    return load_reward_model(RewardSpec(name), Settings())


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward(tmp_path_factory.mktemp("reward"))


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_policy_is_loaded(policy_folder: Path) -> None:
    model = load_policy_model(str(policy_folder), Settings())
    assert model.network.dtype == torch.float32
    assert model.network.config._attn_implementation == "sdpa"
    assert not model.network.training
    assert model.context == CONTEXT
    assert len(model.stop_tokens) == 1


def test_capped_attention_is_loaded_eager(tmp_path: Path) -> None:
    model = load_policy_model(str(save_capped(tmp_path)), Settings())
    assert model.network.config._attn_implementation == "eager"


def test_all_end_tokens_are_loaded(policy_folder: Path, tmp_path: Path) -> None:
    folder = copy(policy_folder, tmp_path)
    edit(folder / "generation_config.json", eos_token_id=[3, 5])
    assert load_policy_model(str(folder), Settings()).stop_tokens >= {3, 5}


def test_dtype_applies_to_policies_and_not_to_rewards(policy_folder: Path, reward_folder: Path) -> None:
    settings = Settings(dtype="bfloat16")
    assert load_policy_model(str(policy_folder), settings).network.dtype == torch.bfloat16
    assert load_reward_classifier(str(reward_folder), settings).network.dtype == torch.float32
    halved = load_reward_classifier(str(reward_folder), Settings(reward_dtype="bfloat16"))
    assert halved.network.dtype == torch.bfloat16


def test_missing_device_is_rejected(policy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelRefusedError, match="TPO_DEVICE=cuda"):
        load_policy_model(str(policy_folder), Settings(device="cuda"))


@pytest.mark.parametrize("load", [load_any_policy, load_any_reward])
def test_missing_folder_is_rejected(load: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelRefusedError, match="There is no folder"):
        load(str(tmp_path / "none"))


def test_folder_without_config_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ModelRefusedError, match=r"holds no config\.json"):
        load_policy(ModelSpec(str(tmp_path)), Settings())


def test_folder_without_weights_is_rejected(policy_folder: Path, tmp_path: Path) -> None:
    folder = copy(policy_folder, tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelRefusedError, match="holds no weights"):
        load_policy(ModelSpec(str(folder)), Settings())


@pytest.mark.parametrize(("kind", "load"), [("policy", load_any_policy), ("reward", load_any_reward)])
def test_pickle_is_never_opened(kind: str, load: Any, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = copy(request.getfixturevalue(f"{kind}_folder"), tmp_path)
    (folder / "model.safetensors").unlink()
    opened = tmp_path / "opened"
    (folder / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {opened}'\ntR.".encode())
    with pytest.raises(ModelRefusedError, match=r"is a pickle.*save_pretrained"):
        load(str(folder))
    assert not opened.exists()


def test_truncated_weights_are_rejected(policy_folder: Path, tmp_path: Path) -> None:
    folder = copy(policy_folder, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelRefusedError):
        load_policy(ModelSpec(str(folder)), Settings())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[" * 200_000),
        ("config.json", '{"model_type": "llama", "num_attention_heads": 0}'),
        ("tokenizer.json", "[" * 200_000),
        ("tokenizer.json", '{"junk": "' + "x" * 5_000_000 + '"}'),
        ("model.safetensors", "x" * 1000),
    ],
)
def test_corrupt_file_is_rejected(name: str, content: str, policy_folder: Path, tmp_path: Path) -> None:
    folder = copy(policy_folder, tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(ModelRefusedError, match="cannot be loaded") as error:
        load_policy(ModelSpec(str(folder)), Settings())
    assert len(str(error.value)) < 1000


def test_language_model_is_rejected_as_reward_model(policy_folder: Path) -> None:
    with pytest.raises(ModelRefusedError, match="is not a reward model: its config names LlamaForCausalLM"):
        load_reward_model(RewardSpec(str(policy_folder)), Settings())


def test_reward_model_without_score_head_is_rejected(policy_folder: Path, tmp_path: Path) -> None:
    folder = copy(policy_folder, tmp_path)
    edit(
        folder / "config.json",
        architectures=["LlamaForSequenceClassification"],
        id2label={"0": "LABEL_0"},
        label2id={"LABEL_0": 0},
    )
    with pytest.raises(ModelRefusedError, match=r"has no score\.weight"):
        load_reward_model(RewardSpec(str(folder)), Settings())


def test_reward_model_with_several_labels_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ModelRefusedError, match="has 3 labels"):
        load_reward_model(RewardSpec(str(save_reward(tmp_path, num_labels=3))), Settings())


@pytest.mark.parametrize(("kind", "load"), [("policy", load_any_policy), ("reward", load_any_reward)])
def test_code_of_a_repository_is_never_run(
    kind: str, load: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = copy(request.getfixturevalue(f"{kind}_folder"), tmp_path)
    (folder / "own.py").write_text("raise SystemExit('this was run')")
    models = {"AutoModelForCausalLM": "own.M", "AutoModelForSequenceClassification": "own.M"}
    edit(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.C", **models})
    with pytest.raises(ModelRefusedError, match="needs code from its own repository"):
        load(str(folder))


def test_code_of_a_tokenizer_is_never_run(policy_folder: Path, tmp_path: Path) -> None:
    folder = copy(policy_folder, tmp_path)
    (folder / "own.py").write_text("raise SystemExit('this was run')")
    edit(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.T", "own.T"]})
    with contextlib.suppress(ModelRefusedError):  # the library may load it as a tokenizer of its own
        load_policy_model(str(folder), Settings())


def test_unknown_architecture_is_rejected(policy_folder: Path, tmp_path: Path) -> None:
    folder = copy(policy_folder, tmp_path)
    edit(folder / "config.json", model_type="unheard_of")
    with pytest.raises(ModelRefusedError, match="unheard_of"):
        load_policy(ModelSpec(str(folder)), Settings())


def test_unsupported_layer_type_is_rejected(tmp_path: Path) -> None:
    folder = save_llama(tmp_path)
    edit(folder / "config.json", model_type="qwen3_next", layer_types=["linear_attention", "full_attention"])
    with pytest.raises(ModelRefusedError, match="linear_attention"):
        load_policy(ModelSpec(str(folder)), Settings())


@pytest.mark.parametrize(("save", "load"), [(save_llama, load_any_policy), (save_reward, load_any_reward)])
def test_tokenizer_without_a_chat_template_is_rejected(save: Any, load: Any, tmp_path: Path) -> None:
    folder = save(tmp_path, template=None)
    with pytest.raises(ModelRefusedError, match=r"no chat template.*chat_template\.jinja"):
        load(str(folder))


@pytest.mark.parametrize("tied", [False, True])
def test_reward_model_is_rejected_as_policy(tied: bool, tmp_path: Path) -> None:
    with pytest.raises(ModelRefusedError, match="is not a policy: its config names LlamaForSequenceClassification"):
        load_policy(ModelSpec(str(save_reward(tmp_path, tie_word_embeddings=tied))), Settings())


def test_policy_without_lm_head_is_rejected(reward_folder: Path, tmp_path: Path) -> None:
    headless = copy(reward_folder, tmp_path)
    edit(headless / "config.json", architectures=["LlamaForCausalLM"])
    with pytest.raises(ModelRefusedError, match=r"has no lm_head\.weight"):
        load_policy(ModelSpec(str(headless)), Settings())


@pytest.mark.processes
def test_hub_name_without_network_is_rejected() -> None:
    code = (
        "from tpo.backends import load_policy\nfrom tpo.core.errors import ModelRefusedError\n"
        "from tpo.backends.spec import ModelSpec\nfrom tpo.settings import Settings\n"
        "try: load_policy(ModelSpec('nobody/nothing'), Settings())\n"
        "except ModelRefusedError as error: print(error)"
    )
    env = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANG_SECONDS, env=env
    )
    assert "cannot be loaded from the Hugging Face Hub" in found.stdout
    assert "HF_HUB_OFFLINE" in found.stdout


def test_missing_torch_error_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tpo.backends.local.policy", None)
    monkeypatch.setitem(sys.modules, "tpo.backends.local.reward", None)
    with pytest.raises(ModelRefusedError, match="pip install"):
        load_policy(ModelSpec("demo"), Settings())
    with pytest.raises(ModelRefusedError, match="pip install"):
        load_reward_model(RewardSpec("demo"), Settings())


def test_thread_count_is_applied(policy_folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        load_policy_model(str(policy_folder), Settings(threads=1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
