"""Constructed responses to the dev prompts, which show that each of them can be satisfied."""

import json

# No letter, word or comma that a dev prompt limits; long enough for langdetect when repeated.
ENGLISH = "The old man sat near the sea and a warm wind came ashore."
SENTENCES = {
    "es": "El viejo mira el mar y piensa en su familia que vive muy lejos.",
    "fr": "Le vieil homme regarde la mer et pense à sa famille qui habite très loin.",
    "ja": "老人は海を見ながら遠くに住んでいる家族のことを考えています。",
    "uk": "Старий чоловік дивиться на море і думає про свою родину яка живе далеко.",
    "pl": "Stary człowiek patrzy na morze i myśli o rodzinie która mieszka daleko.",
    "he": "האיש הזקן מביט בים וחושב על משפחתו שגרה רחוק מאוד.",
}


def enough(given: dict, sentence: str) -> str:
    """As many sentences as the lengths allow, then what has to occur a number of times."""
    relations = [kwargs.get("relation") or kwargs.get("let_relation") for kwargs in given.values()]
    words = given.get("length_constraints:number_words", {})
    sentences = given.get("length_constraints:number_sentences", {})
    count = 1 if "less than" in relations else 3
    if words.get("relation") == "at least":
        count = words["num_words"] // len(sentence.split()) + 1
    if sentences.get("relation") == "at least":
        count = max(count, sentences["num_sentences"])
    parts = [sentence] * count
    for kwargs in given.values():
        parts += kwargs.get("keywords", [])
        parts += ["[1]"] * kwargs.get("num_placeholders", 0)
        parts += [f"*{sentence}*"] * kwargs.get("num_highlights", 0)
        if kwargs.get("let_relation") == "at least":
            parts.append(kwargs["letter"] * kwargs["let_frequency"])
        if "keyword" in kwargs and kwargs["relation"] == "at least":
            parts += [kwargs["keyword"]] * kwargs["frequency"]
        if kwargs.get("capital_relation") == "at least":
            parts += ["SEA"] * kwargs["capital_frequency"]
    return " ".join(parts)


def arranged(given: dict, text: str, sentence: str) -> str:
    """The text with the paragraphs, sections or responses that are asked for."""
    if kwargs := given.get("length_constraints:number_paragraphs"):
        return "\n***\n".join([sentence] * (kwargs["num_paragraphs"] - 1) + [text])
    if kwargs := given.get("length_constraints:nth_paragraph_first_word"):
        paragraphs = [text] + [sentence] * (kwargs["num_paragraphs"] - 1)
        nth = kwargs["nth_paragraph"] - 1
        paragraphs[nth] = f"{kwargs['first_word']} {paragraphs[nth]}"
        return "\n\n".join(paragraphs)
    if kwargs := given.get("detectable_format:multiple_sections"):
        numbers = range(1, kwargs["num_sections"] + 1)
        return "\n".join(f"{kwargs['section_spliter']} {n}\n{text}" for n in numbers)
    if "combination:two_responses" in given:
        return f"{text}\n******\n{sentence}"
    return text


def constructed(prompt: dict) -> str:
    """A response that follows every instruction of the prompt."""
    given = dict(zip(prompt["instruction_id_list"], prompt["kwargs"], strict=True))
    if "detectable_format:constrained_response" in given:
        return "My answer is maybe."
    language = given.get("language:response_language", {}).get("language")
    sentence = SENTENCES.get(language, ENGLISH)
    text = arranged(given, enough(given, sentence), sentence)
    if kwargs := given.get("detectable_format:number_bullet_lists"):
        text += f"\n* {sentence}" * kwargs["num_bullets"]
    if "detectable_format:json_format" in given:
        return json.dumps({"response": text})
    if "detectable_format:title" in given:
        text = f"<<{sentence}>>\n{text}"
    if kwargs := given.get("combination:repeat_prompt"):
        text = f"{kwargs['prompt_to_repeat']}\n{text}"
    if kwargs := given.get("detectable_content:postscript"):
        text += f"\n{kwargs['postscript_marker']} {sentence}"
    if kwargs := given.get("startend:end_checker"):
        text += f" {kwargs['end_phrase']}"
    if "change_case:english_capital" in given:
        text = text.upper()
    if "change_case:english_lowercase" in given:
        text = text.lower()
    return f'"{text}"' if "startend:quotation" in given else text
