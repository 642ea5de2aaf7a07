"""The built-in stories: the same for everybody, different from one another, and worth remembering."""

import hashlib
import re
import time

from seqmodels.data.text import toy


def test_stories_never_change_without_a_new_version():
    text = "\0".join(toy.stories("train", 500))
    assert (toy.VERSION, hashlib.sha256(text.encode()).hexdigest()[:16]) == (1, "6bd70cd19379e6a0")


def test_thousands_of_stories_in_a_moment():
    start = time.process_time()
    stories = list(toy.stories("train", 2000))
    assert time.process_time() - start < 3  # 0.2 on an idle machine
    assert len(set(stories)) == 2000
    mean = sum(len(story.encode()) for story in stories) / len(stories)
    assert abs(mean / toy.MEAN_BYTES - 1) < 0.05


def test_no_validation_story_is_a_training_story():
    assert not set(toy.stories("validation", toy.VALIDATION_DOCUMENTS)) & set(toy.stories("train", 5000))


def test_stories_are_well_formed_english():
    for story in toy.stories("train", 1000):
        assert story.isascii() and "{" not in story and "  " not in story
        assert not re.search(r"\b[Aa] [aeiou]", story) and not re.search(r"\b[Aa]n [^aeiou]", story)
        for paragraph in story.split("\n"):
            assert re.match(r'["A-Z]', paragraph) and re.search(r'[.!?]"?$', paragraph), paragraph
            assert paragraph.count('"') % 2 == 0


def test_what_a_story_says_early_comes_back_later():
    # A hidden thing is found where it was hidden, with words of other matters between.
    asked = re.compile(r"It was ([a-z ]+)! The ([a-z]+) was still as ([a-z]+) as before")
    found = 0
    for story in toy.stories("train", 2000):
        for answer in asked.finditer(story):
            place, thing, colour = answer.groups()
            before = story[: answer.start()]
            assert re.search(rf"{colour} {thing}[^.]*\.?[^.]*{place}", before)
            assert len(before) - before.index(place) > 100
            found += 1
    assert found > 50
