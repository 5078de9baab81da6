"""Prompt sets: the prompts of each step, and the extraction of the answer from a reply."""

from typing import Any

import pytest
from pydantic import ValidationError

from tpo.core.errors import InvalidInputError
from tpo.core.prompts import STEPS, PromptSet, load, names

TEXTS = {"query": "QUERY", "chosen": "CHOSEN", "rejected": "REJECTED", "critique": "LOSS", "gradient": "GRADIENT"}
TEXTS_BEFORE = {"critique": 3, "gradient": 4, "update": 5}


def texts_for(step: str, **changed: str) -> dict[str, str]:
    """Return the texts that exist before a step."""
    return dict(list((TEXTS | changed).items())[: TEXTS_BEFORE[step]])


def custom(**changed: Any) -> PromptSet:
    """Return a prompt set of the style `separate`, with changes."""
    steps = {
        "critique": "L $query $chosen",
        "gradient": "G $critique",
        "update": "U $gradient $answer_open $answer_close",
    }
    values = {"name": "mine", "version": 1, "style": "separate", "answer_tags": ("<a>", "</a>")}
    return PromptSet.model_validate(values | {"tpo": steps, "revision": steps} | changed)


def test_load_finds_shipped_prompt_sets() -> None:
    assert {"conversation", "separate", "tiny"} <= set(names())
    for name in names():
        assert load(name).name == name
    with pytest.raises(InvalidInputError, match="there are conversation") as raised:
        load("../state")
    assert raised.value.param == "prompt_set"


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("compared", [True, False], ids=["tpo", "revision"])
def test_render_includes_texts_of_each_step(name: str, compared: bool) -> None:
    prompts = load(name)
    for step in STEPS:
        texts = texts_for(step)
        if not compared:
            texts.pop("rejected")
        turns = prompts.render(step, texts)
        assert [role for role, _ in turns] == ["user", "assistant"] * (len(turns) // 2) + ["user"]
        everything = "\n".join(content for _, content in turns)
        if name != "tiny":
            assert all(text in everything for text in texts.values())
            assert all(tag in everything for tag in prompts.answer_tags) == (step == "update")
        assert "$" not in everything
        assert ("REJECTED" in everything) <= compared


def test_conversation_steps_extend_previous_turns() -> None:
    prompts = load("conversation")
    critique, gradient, update = (prompts.render(step, texts_for(step)) for step in STEPS)
    assert gradient[:-1] == [*critique, ("assistant", "LOSS")]
    assert update[:-1] == [*gradient, ("assistant", "GRADIENT")]
    whole = "\n".join(content for _, content in update)
    assert (whole.count("QUERY"), whole.count("LOSS"), whole.count("GRADIENT")) == (1, 1, 1)
    assert len(load("separate").render("update", texts_for("update"))) == 1


@pytest.mark.parametrize("name", names())
def test_render_inserts_texts_unchanged(name: str) -> None:
    hostile = "$query ${chosen} $$ $ {query} {0} %s \\1 <SEP> </improved_response> $rejected"
    for step in STEPS:
        for field in texts_for(step):
            turns = load(name).render(step, texts_for(step, **{field: hostile}))
            plain = load(name).render(step, texts_for(step, **{field: "PLAIN"}))
            assert turns == [(role, content.replace("PLAIN", hostile)) for role, content in plain]


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("<a>yes</a>", "yes"),
        ("Sure: <a> yes\n</a> I hope it helps.", "yes"),
        ("I put it between <a> and </a>. <a>yes</a>", "yes"),
        ("First <a>draft</a>, then <a>yes</a>", "yes"),
        ("After <a> comes <a>yes</a>", "yes"),
        ("<a>yes</a> and an empty <a></a>", "yes"),
        ("<a>yes</a> and a blank <a> \n </a>", "yes"),
        ("<a>yes</a> closes with </a>", "yes"),
        ("</a><a>yes</a>", "yes"),
        ("<a>yes</a><a>cut o", "yes"),
        ("<a></a>", None),
        ("<a>   </a>", None),
        ("<a>cut o", None),
        ("no tags", None),
        ("</a> the wrong way round <a>", None),
        ("", None),
        ("<a>a <SEP> b</a>", "a <SEP> b"),
        ("<a>one\n\ntwo</a>", "one\n\ntwo"),
    ],
)
def test_extract_uses_last_complete_pair(reply: str, answer: str | None) -> None:
    assert custom().extract(reply) == answer


def test_is_unfinished_when_last_answer_is_open() -> None:
    assert custom().is_unfinished("<a>draft</a><a>cut o")
    assert custom().is_unfinished("<a>cut o")
    assert not custom().is_unfinished("<a>whole</a> and some mo")
    assert not custom().is_unfinished("none")


def templates(**changed: str) -> dict[str, str]:
    """Return templates for the three steps, with changes."""
    return {"critique": "L", "gradient": "G", "update": "U"} | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tpo": templates(critique="it costs $ 5")}, "doubled"),
        ({"tpo": templates(critique="$answer")}, r"tpo.critique uses \['answer'\]"),
        ({"tpo": templates(critique="$gradient")}, "tpo.critique uses"),
        ({"tpo": templates(gradient="$gradient")}, "tpo.gradient uses"),
        ({"revision": templates(update="$rejected")}, "revision.update uses"),
        ({"tpo": templates(update=" ")}, "at least 1 character"),
        ({"answer_tags": ("<a>", "<a>")}, "two different"),
        ({"answer_tags": ("<a>", " ")}, "non-empty"),
        ({"version": 0}, "version"),
        ({"style": "other"}, "style"),
        ({"more": 1}, "more"),
    ],
)
def test_prompt_set_refuses_invalid_templates(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        custom(**changed)


def test_render_unescapes_doubled_dollar() -> None:
    prompts = custom(tpo=templates(critique="costs $$5 $query"))
    assert prompts.render("critique", texts_for("critique")) == [("user", "costs $5 QUERY")]
