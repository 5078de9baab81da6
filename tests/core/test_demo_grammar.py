"""The demo grammar: the checker agrees with the generator, and training contains nothing that is held out."""

import json
import random
import re
from statistics import fmean

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from demo import experiment, grammar, judge, reward_training, transcripts, unseen
from demo.examples import SHARES, make_example, make_pair, prompt
from demo.faults import FAULTS
from demo.settings import FOLDER, MODELS
from tpo.core.loop import apply, pending
from tpo.core.ports import Generate, Generation, Rewards, Score, Text
from tpo.core.prompts import load
from tpo.core.state import Message, Params, State


@pytest.fixture
def source() -> random.Random:
    """Return a random source with a fixed seed."""
    return random.Random(7)


def test_checker_agrees_with_generator(source: random.Random) -> None:
    for _ in range(500):
        facts = grammar.make_facts(source)
        reply = grammar.make_reply(source, facts, share=source.random())
        found = grammar.check(reply.text, facts)
        assert set(grammar.QUALITIES) - found.met == set(reply.missing)
        assert (found.wrong, found.repeats, found.unknown) == ((), 0, ())
        assert not grammar.invented_words(reply.text)


@pytest.mark.parametrize("kind", FAULTS)
def test_check_lowers_value_for_each_fault(kind: str, source: random.Random) -> None:
    seen = 0
    while seen < 100:
        facts = grammar.make_facts(source)
        reply = grammar.make_reply(source, facts, share=0.8, rude=0.0)
        if damaged := FAULTS[kind](source, facts, reply):
            seen += 1
            assert grammar.check(damaged.text, facts).value < grammar.check(reply.text, facts).value, damaged.text


def test_check_names_wrong_fact(source: random.Random) -> None:
    facts = grammar.make_facts(source)
    other = next(name for name in grammar.NAMES if name != facts.name)
    found = grammar.check(f"Dear {other}, The box was too weak.", facts)
    assert found.wrong == ("name",)
    assert found.met == {"reason", grammar.POLITE}


def test_check_reports_unknown_sentence_and_reads_the_others(source: random.Random) -> None:
    found = grammar.check("The box was too weak. Blorb the zif. It takes two days.", grammar.make_facts(source))
    assert found.unknown == ("Blorb the zif.",)
    assert found.met == {"reason", "time", grammar.POLITE}
    assert grammar.invented_words("Blorb the box.") == ["Blorb"]


def test_apply_adds_only_suggested_parts(source: random.Random) -> None:
    for _ in range(300):
        facts = grammar.make_facts(source)
        chosen, rejected = make_pair(source, facts)
        wanted = grammar.criticise(chosen, rejected).suggested
        improved = grammar.apply(source, facts, chosen, wanted)
        if improved != chosen:
            assert set(improved.missing) == set(chosen.missing) - set(wanted)
        kept = [part for part in chosen.parts if part in improved.parts]
        assert kept == [part for part in improved.parts if part in chosen.parts]


def test_judge_reads_back_critiques_and_suggestions(source: random.Random) -> None:
    for _ in range(300):
        facts = grammar.make_facts(source)
        chosen, rejected = make_pair(source, facts)
        critique = grammar.criticise(chosen, rejected)
        claims = judge.read_critique(grammar.critique_text(critique, facts, compared=True), facts)
        assert all(claim.holds(chosen.text, rejected.text, facts) for claim in claims)
        assert judge.asked_for(claims) == list(critique.suggested)
        suggestions = grammar.suggestions_text(critique.suggested, facts)
        assert judge.read_suggestions(suggestions, facts) == list(critique.suggested)


def test_judge_detects_false_claim(source: random.Random) -> None:
    facts = grammar.make_facts(source)
    (claim,) = judge.read_critique("The chosen reply lacks a reason.", facts)
    assert not claim.holds("The box was too weak.", None, facts)
    (strange,) = judge.read_critique("The chosen reply lacks a greeting for Nobody.", facts)
    assert strange.kind is None


def test_training_excludes_held_out_messages(source: random.Random) -> None:
    held_out = {(facts.name, facts.item) for facts in experiment.held_out_facts(300)}
    seen = {(facts.name, facts.item) for facts in (grammar.make_facts(source) for _ in range(5000))}
    assert not held_out & seen
    assert all(grammar.is_held_out(name, item) for name, item in held_out)


def test_unseen_set_shares_no_fact_or_wording_with_training(source: random.Random) -> None:
    examples = [make_example(source) for _ in range(3000)]
    seen = {word.lower() for example in examples for word in re.findall(r"\w+", f"{example.prompt} {example.answer}")}
    seen |= {word.lower() for word in (*grammar.NAMES, *grammar.ITEMS, *grammar.PROBLEMS, *grammar.ASKS)}
    for facts in experiment.unseen_facts(300):
        assert not {facts.name.lower(), facts.item, facts.problem, facts.ask} & seen
    phrases = {phrase for template in (*grammar.QUERIES, *grammar.EXTRAS) for phrase in _phrases(template)}
    new = [phrase for template in (*unseen.QUERIES, *unseen.EXTRAS) for phrase in _phrases(template)]
    assert not phrases.intersection(new)


def _phrases(template: str) -> list[tuple[str, ...]]:
    """Return all sequences of three words of a template; a fact counts as one word."""
    words = re.findall(r"\w+|{\w+}", template)
    return list(zip(words, words[1:], words[2:], strict=False))


def test_checker_recognises_unseen_facts(source: random.Random) -> None:
    for facts, other in zip(experiment.unseen_facts(100), experiment.held_out_facts(100), strict=True):
        reply = grammar.make_reply(source, facts, share=0.8)
        assert set(grammar.QUALITIES) - grammar.check(reply.text, facts).met == set(reply.missing)
        assert not grammar.invented_words(reply.text)
        assert grammar.check(f"Dear {other.name},", facts).wrong == ("name",)
        assert grammar.check(f"Dear {facts.name},", other).wrong == ("name",)


def test_demo_messages_are_held_out() -> None:
    for message in json.loads((FOLDER / "prompts.json").read_text(encoding="utf-8")):
        words = set(message.replace(".", " ").replace(",", " ").replace("?", " ").split())
        (name,), (item,) = words.intersection(grammar.NAMES), words.intersection(grammar.ITEMS)
        assert grammar.is_held_out(name, item)


def test_training_prompts_match_product_prompts() -> None:
    texts = {"query": "Q", "chosen": "C", "rejected": "R", "critique": "L", "gradient": "G"}
    shipped = load("tiny")
    for step in ("critique", "gradient", "update"):
        assert [("user", prompt(step, **texts))] == shipped.render(step, texts)
    assert prompt("critique", query="$chosen", chosen="C").endswith("<query> $chosen\n<chosen> C")


def test_make_example_supports_every_role(source: random.Random) -> None:
    for role in SHARES:
        example = make_example(source, role)
        assert example.role == role
        assert example.prompt
        assert example.answer


def generation(text: str) -> Generation:
    """Return a generation of one sample with this text."""
    return Generation(texts=(Text(text=text, finish_reason="stop", tokens=1),), input_tokens=1, seconds=0.0)


def test_controls_change_only_gradients() -> None:
    state = State(input=(Message(role="user", content="Q"),), params=Params(), prompts=load("tiny"))
    request = pending(state)
    assert isinstance(request, Generate)
    gradient = request.model_copy(update={"kind": "gradient"})
    requests = [gradient, request, gradient, gradient]
    replies = [generation(text) for text in "abcd"]
    for control, expected in (
        (experiment.exchange_gradients, ["d", "b", "a", "c"]),
        (experiment.silence_gradients, [grammar.NO_CHANGE, "b", grammar.NO_CHANGE, grammar.NO_CHANGE]),
    ):
        changed = control(requests, replies)
        assert [reply.texts[0].text for reply in changed if isinstance(reply, Generation)] == expected


def test_training_includes_updates_without_suggestion(source: random.Random) -> None:
    updates = [make_example(source, "update").prompt for _ in range(500)]
    assert any(prompt.endswith(grammar.NO_CHANGE) for prompt in updates)


def test_transcript_shows_run_and_counts_false_claims(source: random.Random) -> None:
    (facts,) = experiment.held_out_facts(1)
    state = experiment.start(experiment.TPO, facts, seed=0)
    chosen = grammar.make_reply(source, facts, share=1.0, rude=0.0).text
    while request := pending(state):
        if isinstance(request, Score):
            values = tuple(float(-i) for i, _ in enumerate(request.responses))
            state = apply(state, request, Rewards(values=values, input_tokens=1, seconds=0.0))
        elif request.kind in ("critique", "gradient"):
            state = apply(state, request, generation("The chosen reply lacks a time. The rejected reply lacks a gift."))
        else:
            texts = [chosen, *["There is no charge."] * (request.n - 1)]
            if request.kind == "update":
                texts = [f"<improved> {text}</improved>" for text in texts]
            reply = generation("").model_copy(update={"texts": tuple(generation(text).texts[0] for text in texts)})
            state = apply(state, request, reply)
    run = experiment.Run(0, 0, facts, state)
    assert transcripts.count(run) == transcripts.Count(claims=4, false_claims=2, wrong_facts=0, invented_words=0)
    transcript = transcripts.transcript(1, run)
    assert facts.query in transcript
    assert f"**Final answer** 0-0 (0.00): {chosen}" in transcript
    record = json.loads(transcripts.log_line("held out", experiment.TPO, run))
    assert [step["critique"] for step in record["iterations"]] == [
        note.critique.text for note in state.iterations if note.critique
    ]


def test_reward_labels_do_not_depend_on_group_position(source: random.Random) -> None:
    groups = [reward_training.make_group(source, reward_training.LATE_FAULT_WEIGHTS) for _ in range(1500)]
    means = [
        fmean(grammar.check(group.texts[place], group.facts).value for group in groups)
        for place in range(reward_training.GROUP)
    ]
    assert max(means) - min(means) < 0.4


def test_reward_marks_fall_at_wrong_facts_and_repetitions(source: random.Random) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODELS / "reward")
    facts = grammar.make_facts(source)
    other = next(item for item in grammar.ITEMS if item != facts.item)
    texts = facts.fill("Hello {name},"), f"Bring the {other} to our shop.", "There is no charge.", "All costs are ours."
    row = reward_training.encode(tokenizer, facts, " ".join(texts))
    stated = [tokenizer.decode([row.tokens[mark.after]]).strip() for mark in row.facts]
    assert list(zip(stated, [mark.rises for mark in row.facts], strict=True)) == [(facts.name, True), (other, False)]
    sentences = [tokenizer.decode(row.tokens[mark.before + 1 : mark.after + 1]).strip() for mark in row.sentences]
    assert list(zip(sentences, [mark.rises for mark in row.sentences], strict=True)) == [
        (texts[0], True),
        (texts[2], True),
        (texts[3], False),
    ]
    assert row.values == [2.0, 1.0, 2.0, 1.0]
    worst, best = torch.zeros(1, len(row.tokens)), torch.zeros(1, len(row.tokens))
    for mark in row.sentences:
        worst[0, mark.after] = worst[0, mark.before] - (5 if mark.rises else -5)
        best[0, mark.after :] = best[0, mark.before] + (5 if mark.rises else -5)
    marks = [row.sentences]
    assert reward_training.mark_loss(best, marks) < 0.01 < 1 < reward_training.mark_loss(worst, marks)
