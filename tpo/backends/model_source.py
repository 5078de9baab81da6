"""Check where a model is loaded from, before anything large is imported."""

import re
from pathlib import Path
from typing import Literal

from tpo.core.errors import ModelRefusedError

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PICKLES = ("*.bin", "*.pt", "*.pth")

Role = Literal["policy", "reward model"]


def check_source(spec: str, role: Role) -> None:
    """Raise ModelRefusedError if `spec` is neither a model folder nor a name on the Hugging Face Hub."""
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        if _HUB_NAME.fullmatch(spec) and not spec.startswith("."):
            return
        raise ModelRefusedError(f"There is no folder {spec} to load the {role} from.")
    if not (folder / "config.json").is_file():
        raise ModelRefusedError(f"The folder {spec} holds no config.json, so it is not a {role} saved by transformers.")
    if any(folder.glob("*.safetensors")):
        return
    if any(file for pattern in _PICKLES for file in folder.glob(pattern)):
        raise ModelRefusedError(
            f"The {role} in {spec} is a pickle. A pickle can run code when it is opened, so it is not loaded. If "
            "you trust the file, save it as safetensors: model.save_pretrained(folder) with a current transformers."
        )
    raise ModelRefusedError(f"The folder {spec} holds no weights: a {role} needs a *.safetensors file.")
