"""Weights and tokenizer from a folder or the Hub into memory, or a refusal that says what to do."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tpo.backends.chat import Chat
from tpo.backends.model_source import Role
from tpo.core.errors import ModelRefusedError
from tpo.core.state import Message
from tpo.settings import Settings

_LAYER_KINDS = {"full_attention", "sliding_attention"}

_UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    TypeError,
    RuntimeError,
    ImportError,
    SafetensorError,
)
"""What transformers and tokenizers raise at files that are missing, or hold something else."""


@dataclass(frozen=True)
class Model:
    """A model in memory with what is needed to speak to it."""

    name: str
    network: Any
    chat: Chat
    context: int
    """Tokens that it reads and writes at most, in one sequence."""
    stop_tokens: frozenset[int]

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        return int(self.network.get_input_embeddings().weight.shape[0])


def load_policy_model(spec: str, settings: Settings) -> Model:
    """A causal language model with a chat template. Raises ModelRefusedError."""
    _prepare(settings)
    device = _device(settings)
    config = _config(spec, "policy")
    if _classifies(config):
        # With tied embeddings nothing of a policy is missing in its file: it would load, and write nonsense.
        raise ModelRefusedError(
            f"{spec} is not a policy: its config names {', '.join(config.architectures)}. Name a causal language "
            "model, and this one as the reward model."
        )
    text_config = config.get_text_config()
    odd = set(getattr(text_config, "layer_types", None) or ()) - _LAYER_KINDS
    if odd:
        raise ModelRefusedError(
            f"The policy {spec} has layers of kind {', '.join(sorted(odd))}, which this back end does not keep between "
            "tokens. Serve it with vLLM or SGLang, or take a model with plain or sliding-window attention."
        )
    dtype = _policy_dtype(settings, device)
    network, missing = _weights(AutoModelForCausalLM, spec, "policy", config, dtype, device)
    if missing:
        raise ModelRefusedError(
            f"{spec} is not a whole policy: its file has no {', '.join(sorted(missing)[:3])}, which would be random "
            "numbers. Download it again, or name a causal language model."
        )
    tokenizer = _tokenizer(spec, "policy")
    model = Model(
        name=spec,
        network=network,
        chat=Chat(tokenizer, f"The policy {spec}"),
        context=_context(text_config, tokenizer),
        stop_tokens=_stop_tokens(network, tokenizer),
    )
    _try_out(model, "policy")
    return model


def load_reward_network(spec: str, settings: Settings) -> Model:
    """A sequence classifier with one label and a chat template. Raises ModelRefusedError."""
    _prepare(settings)
    device = _device(settings)
    config = _config(spec, "reward model")
    labels = config.get_text_config().num_labels
    if not _classifies(config):
        raise ModelRefusedError(
            f"{spec} is not a reward model: its config names {', '.join(config.architectures or ['no architecture'])}. "
            "A reward model here is a …ForSequenceClassification with one label, such as Skywork-Reward-V2."
        )
    if labels != 1:
        raise ModelRefusedError(
            f"The reward model {spec} has {labels} labels. One is needed: it is read as the score, without a sigmoid."
        )
    dtype = getattr(torch, settings.reward_dtype)
    network, missing = _weights(AutoModelForSequenceClassification, spec, "reward model", config, dtype, device)
    if missing:
        raise ModelRefusedError(
            f"{spec} is not a whole reward model: its file has no {', '.join(sorted(missing)[:3])}, which would be "
            "random numbers. A language model given as a reward model looks like this, and so does a head that needs "
            "its own code."
        )
    tokenizer = _tokenizer(spec, "reward model")
    model = Model(
        name=spec,
        network=network,
        chat=Chat(tokenizer, f"The reward model {spec}"),
        context=_context(config.get_text_config(), tokenizer),
        stop_tokens=frozenset(),
    )
    _try_out(model, "reward model")
    return model


def _prepare(settings: Settings) -> None:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    # What these would print is either in the way (progress bars) or refused below (missing weights).
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def _device(settings: Settings) -> torch.device:
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if settings.device == "auto":
        return torch.device(next(name for name, there in have.items() if there))
    if not have[settings.device]:
        raise ModelRefusedError(
            f"TPO_DEVICE={settings.device}, and torch {torch.__version__} sees no such device here. Set "
            "TPO_DEVICE=auto, or install torch in the build that fits the hardware."
        )
    return torch.device(settings.device)


def _policy_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)  # type: ignore[no-any-return]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported() else torch.float16


def _config(spec: str, role: Role) -> Any:
    try:
        return AutoConfig.from_pretrained(str(Path(spec).expanduser()), trust_remote_code=False)
    except _UNREADABLE as error:
        raise _refusal(spec, role, error) from error


def _classifies(config: Any) -> bool:
    return any("SequenceClassification" in name for name in config.architectures or ())


def _weights(
    auto: Any, spec: str, role: Role, config: Any, dtype: torch.dtype, device: torch.device
) -> tuple[Any, Any]:
    """The network, and the names of the weights that its file lacks."""
    # torch's fused attention cannot cap its logits (Gemma 2), and some architectures (gpt-oss) never use it.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    try:
        fused = not capped and auto._model_mapping[type(config)]._supports_sdpa
        network, info = auto.from_pretrained(
            str(Path(spec).expanduser()),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa" if fused else "eager",
            output_loading_info=True,
        )
        return network.to(device).eval().requires_grad_(False), info["missing_keys"]
    except torch.OutOfMemoryError as error:
        raise ModelRefusedError(f"The {role} {spec} does not fit the memory of {device}: {error}") from error
    except _UNREADABLE as error:
        raise _refusal(spec, role, error) from error


def _tokenizer(spec: str, role: Role) -> Any:
    try:
        return AutoTokenizer.from_pretrained(str(Path(spec).expanduser()), trust_remote_code=False)
    except _UNREADABLE as error:
        raise _refusal(spec, role, error) from error


def _refusal(spec: str, role: Role, error: Exception) -> ModelRefusedError:
    text = str(error)
    if "custom code" in text or "trust_remote_code" in text:
        return ModelRefusedError(
            f"The {role} {spec} needs code from its own repository, which is never run here. Take a model of an "
            "architecture that transformers has, or serve it elsewhere."
        )
    if isinstance(error, OSError) and not Path(spec).expanduser().is_dir():
        return ModelRefusedError(
            f"The {role} {spec} cannot be had from the Hugging Face Hub. Is the name right, is there a network "
            f"(HF_HUB_OFFLINE is honoured), does it need HF_TOKEN, does it have safetensors? {text}"
        )
    return ModelRefusedError(f"The {role} {spec} cannot be loaded: {text}")


def _context(config: Any, tokenizer: Any) -> int:
    """The longest sequence. A tokenizer that knows none says a number beyond all use."""
    positions = getattr(config, "max_position_embeddings", None)
    return int(positions or tokenizer.model_max_length)


def _stop_tokens(network: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a turn: generation configs may name several, and some name none."""
    ids = network.generation_config.eos_token_id
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(i for i in (*listed, tokenizer.eos_token_id) if i is not None)


def _try_out(model: Model, role: Role) -> None:
    """One forward pass, so that what cannot run is refused before any job is taken, and the first job finds it warm."""
    tokens = model.chat.encode([Message(role="user", content="Hello.")], for_reply=True)
    usable = [t for t in tokens if t < model.vocabulary]
    try:
        with torch.inference_mode():
            model.network(input_ids=torch.tensor([usable], device=model.network.device))
    except Exception as error:
        raise ModelRefusedError(f"The {role} {model.name} was loaded and cannot run: {error!r}") from error
