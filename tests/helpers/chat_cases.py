"""Conversations, drawn and fixed, and what a mask supervises of them."""

from hypothesis import strategies as st

CALL = {"function": {"name": "look", "arguments": {"where": "here"}}}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello, who is there?"},
    {"role": "assistant", "content": "Only me."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Still me."},
]


def supervised_text(tokenizer, messages) -> list[str]:
    """The supervised runs of tokens, decoded."""
    out = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    runs, previous = [], 0
    for token, bit in zip(out["input_ids"], out["assistant_masks"], strict=True):
        if bit:
            runs = [*runs, [token]] if not previous else [*runs[:-1], [*runs[-1], token]]
        previous = bit
    return [tokenizer.decode(run) for run in runs]


text = st.text(
    alphabet=st.one_of(
        st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\r\t{}%<|>é😀")
    ),
    max_size=60,
) | st.sampled_from(
    [
        "",
        " ",
        "\n",
        "\r\n x",
        "{% generation %}",
        "add_generation_prompt",
        "<tool_call>",
        "very long " * 900,
    ]
)
calls = st.just({}) | st.just({"tool_calls": [CALL]}) | st.just({"tool_calls": [CALL, CALL]})
answers = st.builds(lambda c, t: {"role": "assistant", "content": c, **t}, text, calls)
questions = st.builds(lambda c: {"role": "user", "content": c}, text)
systems = st.lists(st.builds(lambda c: {"role": "system", "content": c}, text), max_size=1)
chats = st.builds(
    lambda system, turns: system + [message for turn in turns for message in turn],
    systems,
    st.lists(st.tuples(questions, answers), min_size=1, max_size=4),
)
