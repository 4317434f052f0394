"""The page with every response: complete, escaped, small, and useful without scripts."""

import re
from html.parser import HTMLParser

import pytest

from atlas_lib.evaluate import explorer, ifeval, significance

HOSTILE = "<script>alert(1)</script>\x1b[31m"
ROWS = [("base", "chat"), ("SFT", "chat")]


def prompt_of(key: int, words: int) -> dict:
    ids, kwargs = ["length_constraints:number_words"], [{"num_words": words}]
    kwargs[0]["relation"] = "at least"
    text = f"Write {words} words. {HOSTILE}"
    return {"key": key, "prompt": text, "instruction_id_list": ids, "kwargs": kwargs}


def page_of(texts: dict[tuple[str, str], list[str]]) -> str:
    prompts = [prompt_of(key, 3) for key in range(len(texts[ROWS[0]]))]
    responses = {
        row: [{"response": text, "n_tokens": len(text), "stop": None} for text in given]
        for row, given in texts.items()
    }
    verdicts = {row: ifeval.score(prompts, given) for row, given in texts.items()}
    primary = significance.compare_grid(verdicts, 0.05, 0.03)[0]
    return explorer.render_responses(prompts, responses, verdicts, primary, "a label")


class Reader(HTMLParser):
    """The tags and the texts of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_every_response_is_there_by_outcome_with_what_it_did_not_follow():
    base, sft = ["one", "one", "one two three"], ["one two three", "two", "one"]
    page = page_of({ROWS[0]: base, ROWS[1]: sft})
    found = Reader(page)
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Won (1): passed by SFT chat only",
        "Lost (1): passed by base chat only",
        "Neither (1)",
        "Both (0)",
    ]
    assert found.tags.count("details") == 3 + 1  # the prompts and the table
    assert found.texts.count("Not followed: Answer with at least 3 words.") == 4
    assert found.texts.count("base chat: passed") == 1


def test_a_hostile_response_is_text_and_nothing_is_loaded():
    page = page_of({row: [HOSTILE] for row in ROWS})
    assert Reader(page).tags.count("script") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[31m" in page
    assert not re.search(r"(src|href)=|https?://|url\(|@import", page)


@pytest.mark.parametrize(("length", "shown"), [(900, 900), (6000, 1000)])
def test_long_responses_are_cut_so_that_the_page_stays_below_a_megabyte(length, shown):
    page = page_of({row: ["x" * length] * 250 for row in ROWS})
    assert len(page.encode()) < 1_000_000
    assert ("x" * shown in page) and ("x" * (shown + 1) not in page)
    assert (f"({length - shown} characters more)" in page) == (length > shown)
