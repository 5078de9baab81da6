"""Load weights and tokenizer from a folder or the Hub, or refuse with a message that says what to do."""

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
"""Errors that transformers and tokenizers raise for files that are missing or have wrong content."""


@dataclass(frozen=True)
class Model:
    """A loaded model with its tokenizer and limits."""

    name: str
    network: Any
    chat: Chat
    context: int
    """Maximum number of tokens in one sequence, prompt and completion together."""
    stop_tokens: frozenset[int]

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary: all token ids are below it."""
        return int(self.network.get_input_embeddings().weight.shape[0])


def load_policy_model(spec: str, settings: Settings) -> Model:
    """Load a causal language model with a chat template. Raises ModelRefusedError if it cannot serve as a policy."""
    _prepare(settings)
    device = _device(settings)
    config = _config(spec, "policy")
    if _classifies(config):
        # With tied embeddings a classifier's file has every weight of a policy: it would load and generate nonsense.
        raise ModelRefusedError(
            f"{spec} is not a policy: its config names {', '.join(config.architectures)}. Name a causal language "
            "model, and this one as the reward model."
        )
    text_config = config.get_text_config()
    odd = set(getattr(text_config, "layer_types", None) or ()) - _LAYER_KINDS
    if odd:
        raise ModelRefusedError(
            f"The policy {spec} has layers of kind {', '.join(sorted(odd))}, whose state this back end does not keep "
            "between tokens. Serve it with vLLM or SGLang, or use a model with plain or sliding-window attention."
        )
    dtype = _policy_dtype(settings, device)
    network, missing = _weights(AutoModelForCausalLM, spec, "policy", config, dtype, device)
    if missing:
        raise ModelRefusedError(
            f"{spec} is not a complete policy: its file has no {', '.join(sorted(missing)[:3])}, which would be random "
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


def load_reward_classifier(spec: str, settings: Settings) -> Model:
    """Load a sequence classifier with one label and a chat template.

    Raises ModelRefusedError if it cannot serve as a reward model.
    """
    _prepare(settings)
    device = _device(settings)
    config = _config(spec, "reward model")
    labels = config.get_text_config().num_labels
    if not _classifies(config):
        raise ModelRefusedError(
            f"{spec} is not a reward model: its config names {', '.join(config.architectures or ['no architecture'])}. "
            "A reward model must be a …ForSequenceClassification with one label, such as Skywork-Reward-V2."
        )
    if labels != 1:
        raise ModelRefusedError(
            f"The reward model {spec} has {labels} labels. It must have exactly one, whose raw value is the score."
        )
    dtype = getattr(torch, settings.reward_dtype)
    network, missing = _weights(AutoModelForSequenceClassification, spec, "reward model", config, dtype, device)
    if missing:
        raise ModelRefusedError(
            f"{spec} is not a complete reward model: its file has no {', '.join(sorted(missing)[:3])}, which would be "
            "random numbers. The model may be a plain language model, or its head may need code from its repository."
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
    # Their output is either noise (progress bars) or refused below (missing weights).
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def _device(settings: Settings) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if settings.device == "auto":
        return torch.device(next(name for name, found in available.items() if found))
    if not available[settings.device]:
        raise ModelRefusedError(
            f"TPO_DEVICE={settings.device}, but torch {torch.__version__} finds no such device. Set "
            "TPO_DEVICE=auto, or install the torch build for this hardware."
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
    """Load the network; also return the names of the weights that its file lacks."""
    # torch's fused attention cannot cap logits (Gemma 2), and some architectures (gpt-oss) do not support it.
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
        raise ModelRefusedError(f"The {role} {spec} does not fit into the memory of {device}: {error}") from error
    except _UNREADABLE as error:
        raise _refusal(spec, role, error) from error


def _tokenizer(spec: str, role: Role) -> Any:
    try:
        return AutoTokenizer.from_pretrained(str(Path(spec).expanduser()), trust_remote_code=False)
    except _UNREADABLE as error:
        raise _refusal(spec, role, error) from error


def _refusal(spec: str, role: Role, error: Exception) -> ModelRefusedError:
    """Build the error for a model that cannot be loaded, with advice for its likely cause."""
    text = str(error)
    if "custom code" in text or "trust_remote_code" in text:
        return ModelRefusedError(
            f"The {role} {spec} needs code from its own repository, which is never run here. Use a model of an "
            "architecture that transformers includes, or serve it with another server."
        )
    if isinstance(error, OSError) and not Path(spec).expanduser().is_dir():
        return ModelRefusedError(
            f"The {role} {spec} cannot be loaded from the Hugging Face Hub. Check the name, the network "
            f"(HF_HUB_OFFLINE is honoured), whether it needs HF_TOKEN, and whether it has safetensors. {text}"
        )
    return ModelRefusedError(f"The {role} {spec} cannot be loaded: {text}")


def _context(config: Any, tokenizer: Any) -> int:
    """Return the maximum sequence length. A tokenizer without a limit reports a huge number."""
    positions = getattr(config, "max_position_embeddings", None)
    return int(positions or tokenizer.model_max_length)


def _stop_tokens(network: Any, tokenizer: Any) -> frozenset[int]:
    """Return all tokens that end a turn. A generation config may name several or none."""
    ids = network.generation_config.eos_token_id
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(i for i in (*listed, tokenizer.eos_token_id) if i is not None)


def _try_out(model: Model, role: Role) -> None:
    """Run one forward pass, which also warms the model up. Raises ModelRefusedError if the model cannot run."""
    tokens = model.chat.encode([Message(role="user", content="Hello.")], for_reply=True)
    usable = [t for t in tokens if t < model.vocabulary]
    try:
        with torch.inference_mode():
            model.network(input_ids=torch.tensor([usable], device=model.network.device))
    except Exception as error:
        raise ModelRefusedError(f"The {role} {model.name} was loaded but cannot run: {error!r}") from error
