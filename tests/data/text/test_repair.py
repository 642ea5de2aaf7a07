"""Damage of the hub's kind is undone exactly, and sound text comes back as the same object."""

import random

import pytest

from seqmodels.data.text.repair import collapse_blank_lines, repair


def damaged(text: str) -> str:
    """UTF-8 read as cp1252, what it does not define dropped, and paragraphs parted by a blank line."""
    return text.replace("\n", "\n\n").encode("utf-8").decode("cp1252", errors="ignore")


STORIES = [
    "“Hello,” said Tim.\n“It’s late,” said his mom.",
    "He had a “big” idea… and then – or later — he said ‘no’.",
    "The café’s crème brûlée cost £2 and the piñata cost 3€.",
    "She wrote “¿Qué?” and “¡Olé!” on the wall. 25° outside, ½ a pie.",
    "The sign said “Smile 😀” and everyone did.",
    "”“”“’‘",
    "“",
    "”",
    "Registered™ and ∞ and ★ are odd words.\nThe end.",
]


@pytest.mark.parametrize("story", STORIES)
def test_damage_is_undone_exactly(story):
    assert damaged(story) != story
    assert repair(damaged(story)) == story


def test_random_stories_survive_the_damage():
    # Characters all of whose bytes cp1252 defines, and the closing quote, whose last byte it drops.
    draw = random.Random(0)
    alphabet = [*"abc ,.!?'\"\n", *"“”‘’…–—•éèàüñçÉÖ£°½€™😀"]
    for _ in range(2000):
        story = "x" + "".join(draw.choices(alphabet, k=draw.randint(1, 30))).replace("\n\n", "\n") + "x”"
        story = collapse_blank_lines(story)
        assert repair(damaged(story)) == story


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time, there was plain text.\n\nIt had a blank line.",
        "The café’s crème brûlée.\n\n“Très bon,” she said…",
        "😀 🎉 🏳️‍🌈 emoji, and ™ ∞ ★",
        "The château had a pâté: â ã Â Ã alone mean nothing. €5 or £5?",
        "IT WAS THE CAFÉ’S. “NÃO”, “PÃ£O” and GÅ PÅ” – with real quotes nothing is damage",
        "CAFÉ’s, which is also what a damaged ɒ looks like",
        "naïve façade, Ærø, Þór, œuvre, Žižek, Łódź, Škoda",
        "日本語のお話。Русский рассказ. Ελληνικά. עברית",
        "tabs\t and \r\n line ends, and \x00 and \x7f and \x9d",
        "",
    ],
)
def test_sound_text_is_left_alone(text):
    assert repair(text) is text


def test_damage_beside_sound_characters_is_undone_where_it_is_sure():
    # The é and the real quote prove that the text as a whole is not of the damage; “â€” is damage anyway.
    assert repair("the café said â€œhiâ€ and “bye”") == "the café said “hi” and “bye”"
    # Ã© could be either there, so it stays.
    assert repair("“Ã©” beside â€œ") == "“Ã©” beside “"


def test_a_character_that_lost_bytes_stays_and_the_rest_is_repaired():
    lost = damaged("“Á” 🍎")
    assert "Á" not in lost and repair(lost) == "“Ã” ðŸŽ"


def test_undefined_bytes_kept_as_control_characters_are_damage_too():
    assert repair("â€œhiâ€\x9d") == "“hi”"


def test_blank_lines_collapse_only_with_damage():
    assert repair("one\n\ntwo") == "one\n\ntwo"
    assert repair("one\n\n\nitâ€™s two\n\nthree") == "one\nit’s two\nthree"
