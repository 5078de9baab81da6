"""Prompt sets: the policy's prompts as critic, gradient writer and optimizer.

A set is a TOML file of templates (`string.Template`: `$query`, `$chosen`, `$rejected`, `$critique`, `$gradient`,
`$answer_open`, `$answer_close`; `$$` is a dollar). `style` says how they are sent: `conversation` sends one growing
conversation, so that a server can reuse the key/value cache of all that came before; `separate` sends each alone.
"""

import tomllib
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib import resources
from string import Template
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tpo.core.errors import InvalidInputError

Step = Literal["critique", "gradient", "update"]
STEPS: tuple[Step, ...] = ("critique", "gradient", "update")


class Templates(BaseModel):
    """One template for each call."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    critique: str = Field(min_length=1)
    gradient: str = Field(min_length=1)
    update: str = Field(min_length=1)

    @field_validator("*")
    @classmethod
    def _is_template(cls, template: str) -> str:
        if not Template(template).is_valid():
            raise ValueError("a dollar sign must start a placeholder or be doubled")
        return template


_ALWAYS = frozenset({"query", "chosen", "answer_open", "answer_close"})
_KNOWN: dict[Step, frozenset[str]] = {
    "critique": _ALWAYS,
    "gradient": _ALWAYS | {"critique"},
    "update": _ALWAYS | set(STEPS[:2]),
}
"""The placeholders of each step; `tpo` also has the rejected response."""


@lru_cache(maxsize=64)
def _placeholders(text: str) -> frozenset[str]:
    """Return the placeholders of a template. Cached: a set is validated again with every state that holds it."""
    return frozenset(Template(text).get_identifiers())


class PromptSet(BaseModel):
    """A versioned set of prompts: `tpo` compares two responses, `revision` sees only the chosen one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=64)
    version: int = Field(ge=1)
    style: Literal["conversation", "separate"]
    answer_tags: tuple[str, str]
    tpo: Templates
    revision: Templates

    @field_validator("answer_tags")
    @classmethod
    def _two_different_tags(cls, tags: tuple[str, str]) -> tuple[str, str]:
        if not all(tag.strip() for tag in tags) or tags[0] == tags[1]:
            raise ValueError("two different, non-empty tags are needed")
        return tags

    @model_validator(mode="after")
    def _only_what_exists(self) -> Self:
        for mode, templates, extra in (("tpo", self.tpo, {"rejected"}), ("revision", self.revision, set[str]())):
            for step in STEPS:
                if unknown := _placeholders(getattr(templates, step)) - _KNOWN[step] - extra:
                    known = sorted(_KNOWN[step] | extra)
                    raise ValueError(f"{mode}.{step} uses {sorted(unknown)}, and the only placeholders are {known}")
        return self

    def render(self, step: Step, texts: Mapping[str, str]) -> list[tuple[Literal["user", "assistant"], str]]:
        """Render the turns that ask for `step`.

        `texts` holds query and chosen, and those that exist of rejected, critique and gradient.

        Texts are inserted in one pass, so a dollar sign or a placeholder inside a text stays unchanged.
        """
        templates = self.tpo if "rejected" in texts else self.revision
        values = {**texts, "answer_open": self.answer_tags[0], "answer_close": self.answer_tags[1]}

        def prompt(of: Step) -> tuple[Literal["user"], str]:
            return "user", Template(getattr(templates, of)).substitute(values)

        if self.style == "separate":
            return [prompt(step)]
        turns: list[tuple[Literal["user", "assistant"], str]] = []
        for earlier in STEPS[: STEPS.index(step)]:
            turns += [prompt(earlier), ("assistant", texts[earlier])]
        return [*turns, prompt(step)]

    def extract(self, reply: str) -> str | None:
        """Extract the answer of an update: the content of the last complete pair of tags; None without a pair.

        It starts at the last opening tag before the last closing tag, so tags that the model mentions before its
        answer do no harm. An empty pair is skipped.
        """
        opening, closing = self.answer_tags
        end = len(reply)
        while (end := reply.rfind(closing, 0, end)) >= 0:
            start = reply.rfind(opening, 0, end)
            if start < 0:
                return None
            if (answer := reply[start + len(opening) : end].strip()) and closing not in answer:
                return answer
        return None

    def is_unfinished(self, reply: str) -> bool:
        """Return whether an answer begins after the last closing tag."""
        opening, closing = self.answer_tags
        return reply.rfind(opening) > reply.rfind(closing)


def names() -> list[str]:
    """Return the names of the shipped sets."""
    return sorted(f.name.removesuffix(".toml") for f in _folder().iterdir() if f.name.endswith(".toml"))


@cache
def load(name: str) -> PromptSet:
    """Load the shipped set of that name. Raises InvalidInputError."""
    if name not in names():
        raise InvalidInputError(f"unknown prompt set {name!r}; there are {', '.join(names())}", "prompt_set")
    return PromptSet.model_validate(tomllib.loads(_folder().joinpath(f"{name}.toml").read_text(encoding="utf-8")))


def _folder() -> "resources.abc.Traversable":
    return resources.files(__name__)
