"""The survey of chat templates: small templates of known status, and the committed figures."""

import json

import pytest
from checks import ROOT

from tools import template_survey, token_survey
from tools.judge_template import StandIn, pieces, survey_template
from tools.random_chats import Conversations, Shape

TURN = "<|{{ m.role }}|>{{ m.content }}<|end|>"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
EXACT = "{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT
THINKS_LAST = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}" + PROMPT
)
CLOSED_BY_NEXT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}" + PROMPT
TEMPLATES = {
    "exact": EXACT,
    "one row per turn": THINKS_LAST,
    "prompt": EXACT.replace("<|assistant|>", "<|assistant|><think>"),
    "no stop": CLOSED_BY_NEXT,
    "mixed": EXACT.replace("in messages", "in messages if m.content"),  # depends on empty ones
}
MARKED = EXACT.replace(TURN, "{% generation %}" + TURN + "{% endgeneration %}")


@pytest.mark.parametrize(("status", "text"), TEMPLATES.items(), ids=TEMPLATES)
def test_a_template_gets_its_status(status, text):
    assert survey_template(text)["status"] == status


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}" + PROMPT, "no special token"),
        (EXACT.replace("{{ m.content }}", ""), "does not render the content"),
        (EXACT.replace("{% endfor %}", ""), "does not render a plain chat"),
        ("{% for m in messages %}" + TURN + "{% endfor %}", "no generation prompt"),
    ],
)
def test_a_template_is_refused_with_the_reason(text, reason):
    found = survey_template(text)
    assert found["status"] == "refused"
    assert reason in found["reason"]


def test_stop_header_and_lead_are_found():
    found = survey_template(THINKS_LAST)
    assert (found["stop"], found["header"]) == ("<|end|>", "<|assistant|>")
    assert found["lead"] == "<think></think>"
    assert survey_template(EXACT)["lead"] == ""


def test_every_row_of_a_simple_template_is_judged_by_both_methods():
    found = survey_template(EXACT)
    assert found["rows"] == found["judged_by_both"] == found["chats"]["exact"] == 15
    assert found["contradictions"] == []


def test_markers_that_train_more_than_the_responses_are_shown():
    assert survey_template(EXACT)["trl"] is None
    beyond = survey_template(MARKED)["trl"]["beyond"]
    assert any("<|user|>" in piece for piece in beyond), beyond


def test_a_message_that_is_left_out_is_named():
    found = survey_template(EXACT.replace("{{ m.content }}", "{{ m.content if m.role != 'user' }}"))
    assert found["chats"]["dropped"] > 10
    assert found["dropped"] == ["user content"]


def test_a_system_message_that_is_left_out_is_said():
    text = EXACT.replace("in messages", "in messages if m.role != 'system'")
    found = survey_template(text)
    assert (found["status"], found["shows_system"]) == ("exact", False)


def test_tool_calls_and_reasoning_are_judged_where_they_are_rendered():
    calls = "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|end|>"
    thought = "<think>{{ m.reasoning_content }}</think>{{ m.content }}"
    found = survey_template(EXACT.replace("<|end|>", calls).replace("{{ m.content }}", thought))
    assert found["tools"]["status"] == found["reasoning"]["status"] == "exact"
    assert "reasoning_content" in found["reasoning"]["fields"]
    assert "tools" not in survey_template(EXACT)


def test_a_switch_that_makes_a_template_exact_is_named():
    prompt = "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
    found = survey_template(EXACT.replace("<|assistant|>", "<|assistant|>" + prompt))
    expected = {"variable": "enable_thinking=false", "status": "exact"}
    assert (found["status"], found["exact_with"]) == ("prompt", expected)


def test_markers_composed_by_a_template_are_found():
    assert "<|assistant|>" in StandIn(EXACT.replace(PROMPT, "")).markers


def test_conversations_are_reproducible_and_alternate():
    first, second = (Conversations("seed").draw(Shape(arguments="object")) for _ in range(2))
    assert first == second
    asked = [m["role"] for m in first if m["role"] in ("user", "assistant") and m.get("content")]
    assert "user" in asked


def test_pieces_are_the_runs_at_positions():
    assert pieces("abcdef", {0, 1, 4}) == ["ab", "e"]


def test_a_family_whose_template_has_no_stop_counts_no_row(tokenizer):
    token_survey.add_markers(tokenizer, CLOSED_BY_NEXT, rstrip=False)
    found = token_survey.survey_family(tokenizer)
    assert found["statuses"] == {"no stop": 500}
    assert (found["rows"], found["rows_that_differ"]) == (0, 0)


@pytest.fixture(scope="module")
def survey():
    return json.loads((ROOT / "results" / "template_survey.json").read_text("utf-8"))


def test_the_committed_survey_is_complete(survey):
    assert len(survey["templates"]) == 786
    assert sum(count["templates"] for count in survey["statuses"].values()) == 786
    assert survey["statuses"].keys() <= survey["meaning"].keys()
    assert len(survey["tokenizers"]) >= 12
    assert all(family["conversations"] == 500 for family in survey["tokenizers"])


def test_every_contradiction_is_explained(survey):
    explanations = [found["explanation"] for found in survey["contradictions"]]
    explanations += [f["explanation"] for f in survey["tokenizers"] if f["rows_that_differ"]]
    assert "not explained" not in explanations


@pytest.mark.network
@pytest.mark.slow
def test_the_survey_reproduces_the_committed_one(survey):
    again = template_survey.survey_of(list(template_survey.fetch_templates()))
    made = {"commit", "versions"}
    assert {k: v for k, v in again.items() if k not in made} == {
        k: v for k, v in survey.items() if k not in made
    }
