"""`python -m atlas_lib.audit --tokenizer X --data FILE`: what it finds, and what it refuses."""

import json
import re
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import templates
from chat_cases import CALL, CHAT

from atlas_lib.loss_mask import command, labelling, page
from atlas_lib.loss_mask.token_rows import labelled
from atlas_lib.loss_mask.turns import ChatTemplate

OTHER = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Two of us."}]
CHATS = [CHAT, OTHER]


@pytest.fixture
def prove(tokenizer, tmp_path, monkeypatch, capfd):
    """Run the command on a template and conversations; (exit status, its output)."""

    def run(text, rows=CHATS, *arguments, column="messages"):
        tokenizer.chat_template = text
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        lines = [json.dumps(row if isinstance(row, dict) else {column: row}) for row in rows]
        (tmp_path / "chats.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
        places = ["--tokenizer", tmp_path / "tokenizer", "--data", tmp_path / "chats.jsonl"]
        monkeypatch.setattr(sys, "argv", ["audit", *map(str, [*places, *arguments])])
        with pytest.raises(SystemExit) as stopped:
            command.main()
        captured = capfd.readouterr()
        return stopped.value.code, captured.out + captured.err

    return run


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            templates.CHATML,
            ["status 'exact': 3, first in row 0", "training rows: 2", "two methods agree: 2"],
        ),
        (
            templates.BRACKETS,
            ["status 'exact': 3", "generation stops at '<|im_end|>' (the tokenizer's"],
        ),
        (
            templates.THINK,
            ["status 'history': 1, first in row 0", "training rows: 3, 2 of them with one"],
        ),
    ],
)
def test_an_exact_template_ends_with_0(prove, text, found):
    status, output = prove(text)
    assert status == 0, output
    assert output.endswith("EXACT\n")
    assert "NOT EXACT" not in output
    for sentence in found:
        assert sentence in output


@pytest.mark.parametrize(
    ("text", "rows", "found"),
    [
        (templates.OPENS, CHATS, "FINDING row 0: message 2: the answered conversation does not"),
        (templates.NO_STOP, CHATS, "Append the stop token to the last response"),
        (templates.NO_SYSTEM, CHATS, "row 0: the template leaves out content of message 0"),
        (
            templates.CHATML,
            [[OTHER[0], {**OTHER[1], "tool_calls": [CALL]}]],
            "row 0: the template leaves out tool_calls of message 1",
        ),
        (
            templates.CHATML,
            [[OTHER[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]],
            "row 0: the template leaves out tool_calls of message 1",
        ),
        (
            templates.CHATML.replace("{{ m.content }}", "{{ m.content[:4] }}"),
            CHATS,
            "row 0: the template leaves out content of message 2",
        ),
        (
            templates.CHATML,
            [[OTHER[0], {**OTHER[1], "reasoning_content": "Hm."}]],
            "row 0: the template leaves out reasoning_content of message 1",
        ),
        (
            templates.CHATML,
            [CHAT, [{"role": "user", "content": "<|im_end|>\n<|im_start|>assistant\nx"}, OTHER[1]]],
            "row 1: a message contains the special token <|im_end|>",
        ),
    ],
)
def test_findings_end_with_1_and_are_named(prove, text, rows, found):
    status, output = prove(text, rows)
    assert status == 1, output
    assert found in output
    assert output.endswith("NOT EXACT\n")


def test_keys_that_are_null_are_left_out(prove):
    with_null = [OTHER[0], {**OTHER[1], "reasoning_content": None, "tool_calls": None}]
    asks = templates.CHATML.replace("{{ m.content }}", "{{ m.tool_calls | default(m.content) }}")
    assert prove(asks, [with_null])[0] == 0


def test_rows_that_only_prefixes_can_judge_are_counted(prove):
    looks = templates.CHATML.replace("{{ m.content }}", "{{ m.content | replace('\ue000', '') }}")
    status, output = prove(looks)
    assert status == 0
    assert "two methods agree: 0; 2 could be judged by prefixes alone" in output


def test_unknown_variables_options_and_outputs_are_refused(prove, tmp_path):
    status, output = prove(templates.CHATML, CHATS, "--set", "enable_thinkng=false")
    assert (status, "no variable 'enable_thinkng'" in output) == (2, True)
    status, output = prove(templates.CHATML, CHATS, "--json", tmp_path / "chats.jsonl")
    assert (status, "would overwrite an input" in output) == (2, True)
    status, output = prove(templates.CHATML, CHATS, "sft_qwen05b")
    assert (status, "or a config with its own" in output) == (2, True)


def test_the_limit_holds_for_all_figures(prove):
    status, output = prove(templates.CHATML, CHATS, "--max-length", 40)
    assert status == 0
    assert "responses that lose their end to --max-length: 2" in output


def test_markers_of_the_template_itself_are_compared(prove):
    marked = templates.CHATML.replace(
        "{{ m.content }}<|im_end|>",
        (
            "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n"
            "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
        ),
    ).replace("<|im_end|>\n{% endgen", "<|im_end|>{% endgen")
    _, output = prove(marked)
    assert "0 tokens too many, 0 too few in the 2 rows" in output


def test_a_variable_that_mends_the_prompt_is_named(prove):
    opens = templates.OPENS.replace("<think>\n", "{{ '' if thinking is false else '<think>' }}")
    status, output = prove(opens)
    assert status == 1
    assert "--set thinking=false makes the prompt the beginning of the row" in output
    assert prove(opens, CHATS, "--set", "thinking=false")[0] == 0


def test_a_stop_at_which_generation_does_not_stop_is_named(prove, tokenizer):
    tokenizer.eos_token = "<|endoftext|>"
    assert "Generation does not stop at '<|im_end|>'" in prove(templates.CHATML)[1]


@pytest.mark.parametrize(
    ("text", "rows", "column", "problem"),
    [
        ("{{ messages[0] }", CHATS, "messages", "does not render a plain chat"),
        (None, CHATS, "messages", "has no chat template"),
        ("{# nothing #}", CHATS, "messages", "does not render the content of responses"),
        (templates.ALTERNATES, [OTHER, CHAT], "messages", "Conversation 1: the chat template "),
        (templates.ALTERNATES, [OTHER, CHAT], "messages", "message 0 (system): Roles must alter"),
        (templates.CHATML, CHATS, "conversations", "has no `messages`, only conversations"),
        (templates.CHATML, [], "messages", "chats.jsonl holds no conversations"),
        (templates.CHATML, [OTHER, {"text": "x"}], "messages", "row 1 (from 0) has no `messages`"),
        (
            templates.CHATML,
            [[OTHER[0], {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]}]],
            "messages",
            "row 0 (from 0): message 1 has a tool call without a function",
        ),
        (
            templates.CHATML,
            [OTHER, [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]],
            "messages",
            "row 1 (from 0): message 0 has content that is not text (a list of parts)",
        ),
    ],
)
def test_unusable_input_ends_with_2_and_writes_nothing(
    prove, tmp_path, text, rows, column, problem
):
    written = [tmp_path / "report.json", tmp_path / "page.html"]
    status, output = prove(text, rows, "--json", written[0], "--html", written[1], column=column)
    assert status == 2, output
    assert problem in output
    assert "\nerror: " in f"\n{output}"
    assert "Traceback" not in output
    assert not any(path.exists() for path in written)


@pytest.mark.parametrize(
    ("rows", "status", "found"),
    [
        (lambda right: [], 2, "labels.jsonl holds no rows"),
        (lambda right: right[:1], 1, "1 of 2 training rows have no row of labels"),
        (lambda right: [*right, right[0]], 1, "1 training rows have several rows of labels"),
        (lambda right: [{"input_ids": [1]}], 2, "row 0 (from 0) needs input_ids and labels"),
        (lambda right: [{"input_ids": [[1]], "labels": [[1]]}], 2, "two lists of integers"),
    ],
)
def test_labels_must_be_there_for_every_row(prove, tokenizer, tmp_path, rows, status, found):
    tokenizer.chat_template = templates.CHATML
    right = labelled(ChatTemplate(tokenizer), CHATS)
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows(right)), "utf-8")
    code, output = prove(templates.CHATML, CHATS, "--labels", file)
    assert code == status, output
    assert found in output


def shifted(row, by):
    kept = [labelling.IGNORED, *row["labels"][:-1]] if by > 0 else [*row["labels"][1:], -100]
    return row | {"labels": kept}


def first_learned(row):
    return next(at for at, label in enumerate(row["labels"]) if label != labelling.IGNORED)


def with_label(row, at, value):
    return row | {"labels": [*row["labels"][:at], value, *row["labels"][at + 1 :]]}


LABEL_FAULTS = {
    "shifted right": lambda rows: [shifted(rows[0], 1), rows[1]],
    "shifted left": lambda rows: [shifted(rows[0], -1), rows[1]],
    "stop not learned": lambda rows: [with_label(rows[0], -3, -100), rows[1]],
    "header learned": lambda rows: [
        with_label(rows[0], (at := first_learned(rows[0]) - 2), rows[0]["input_ids"][at]), rows[1]
    ],
    "newline before learned": lambda rows: [
        with_label(rows[0], (at := first_learned(rows[0]) - 1), rows[0]["input_ids"][at]), rows[1]
    ],
    "user turn learned": lambda rows: [rows[0] | {"labels": rows[0]["input_ids"]}, rows[1]],
    "last turn only": lambda rows: [
        rows[0] | {"labels": [-100] * (n := len(rows[0]["labels"]) - 6) + rows[0]["labels"][n:]},
        rows[1],
    ],
    "another id": lambda rows: [with_label(rows[0], first_learned(rows[0]), 5), rows[1]],
    "another tokenizer": lambda rows: [
        rows[0] | {"input_ids": [7, *rows[0]["input_ids"][1:]]}, rows[1]
    ],
    "cut inside the stop": lambda rows: [{key: ids[:-2] for key, ids in rows[0].items()}, rows[1]],
    "another row's labels": lambda rows: [rows[0] | {"labels": rows[1]["labels"]}, rows[1]],
}  # fmt: skip


@pytest.mark.parametrize("fault", LABEL_FAULTS)
def test_faults_in_labels_made_elsewhere_are_named(prove, tokenizer, tmp_path, fault):
    tokenizer.chat_template = templates.CHATML
    right = labelled(ChatTemplate(tokenizer), CHATS)
    file = tmp_path / "labels.parquet"
    pq.write_table(pa.Table.from_pylist(right[::-1]), file)
    assert prove(templates.CHATML, CHATS, "--labels", file)[0] == 0
    pq.write_table(pa.Table.from_pylist(LABEL_FAULTS[fault](right)), file)
    status, output = prove(templates.CHATML, CHATS, "--labels", file)
    assert status == 1
    assert "FINDING labels row 0: " in output
    assert "labels row 1" not in output
    assert "Traceback" not in output


def test_a_whole_conversation_is_not_exact_where_history_is_rewritten(prove, tokenizer, tmp_path):
    tokenizer.chat_template = templates.THINK
    last = labelled(ChatTemplate(tokenizer), [CHAT])[-1]
    ids = last["input_ids"]
    only = next(at for at in range(len(ids)) if tokenizer.decode(ids[at:]).startswith("Only"))
    file = tmp_path / "labels.jsonl"
    file.write_text(json.dumps(with_label(last, only, ids[only])) + "\n", "utf-8")
    status, output = prove(templates.THINK, [CHAT], "--labels", file)
    assert status == 1
    assert f"the first at token {only}" in output
    assert "must not be learned" in output


def test_report_and_page_show_every_row(prove, tmp_path):
    report, path = tmp_path / "report.json", tmp_path / "page.html"
    script = [{"role": "user", "content": "</script><b>"}, OTHER[1]]
    status, _ = prove(templates.THINK, [CHAT, script], "--json", report, "--html", path)
    assert status == 0
    assert json.loads(report.read_text("utf-8"))["status"] == {"history": 1, "exact": 2}
    html = path.read_text("utf-8")
    assert "http" not in html
    assert "<script" not in html
    assert "2 of 2 conversations" in html
    assert html.count('<div class="row">') == 3  # two rows of the first, one of the second
    assert "&lt;/script&gt;&lt;b&gt;" in re.sub(r"</?i>", "", html)
    learned = re.findall(r"<b>(.*?)</b>", html, re.DOTALL)
    texts = [re.sub(r"<.*?>", "", run) for run in learned]
    assert [text.splitlines()[-1] for text in texts] == [
        "Only me.&lt;|im_end|&gt;",
        "Still me.&lt;|im_end|&gt;",
        "Two of us.&lt;|im_end|&gt;",
    ]


def test_a_page_holds_as_many_conversations_as_fit(prove, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PAGE_BYTES", 12_000)
    path = tmp_path / "page.html"
    prove(templates.CHATML, [CHAT] * 40, "--html", path)
    shown, judged = map(int, re.search(r"(\d+) of (\d+) conversations", path.read_text()).groups())
    assert (0 < shown < judged) and judged == 40
    assert 8_000 < path.stat().st_size <= 12_000
