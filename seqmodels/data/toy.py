"""Simple stories from a seeded generator: text to learn from without a network or a download.

Each story binds names, colours, things and places early and asks for them later: a thing hidden in
one place is looked for after something else has happened, a present is remembered with its giver, a
promise is kept with the very food that was promised. A model that forgets the beginning cannot
predict those words, so what separates architectures on real stories separates them here. The text is
our own and under this repository's licence.
"""

import random
import re
from collections.abc import Iterator
from typing import Final

VERSION: Final = 1
"""Part of the key of cached tokens: raise it when any story changes."""

VALIDATION_DOCUMENTS: Final = 200

_GIRLS = "Anna Bella Clara Daisy Ella Fay Grace Holly Ivy June Kate Lily Mia Nora Olive Penny Rose Sara Tess Zoe".split()
_BOYS = "Adam Ben Carl Dan Eli Finn Gus Henry Ian Jack Kit Leo Max Ned Oscar Paul Ray Sam Tom Will".split()
_COLOURS = "red blue green yellow purple orange pink white black brown golden silver".split()
_THINGS = (
    "ball kite drum doll truck boat book box bell hat scarf key lamp cup robot puzzle crown mask shovel bucket "
    "whistle ribbon blanket balloon button coin feather shell marble mitten"
).split()
_ANIMALS = "dog cat rabbit duck frog pony lamb goat mouse owl fox bear turtle squirrel hen puppy kitten bird".split()
_PET_NAMES = "Spot Fluffy Pip Coco Biscuit Pepper Snowy Buddy Muffin Ginger Dot Bruno Socks Honey Patch Momo".split()
_PLACES = (
    "park garden forest beach farm market school library meadow playground village zoo lake hill river orchard"
).split()
_HIDING_PLACES = (
    "under the bed|behind the old tree|in the tall grass|under the wooden bridge|inside the empty barrel|"
    "behind the kitchen door|on the top shelf|under a pile of leaves|in the flower pot|beside the pond|"
    "inside the hollow log|behind the stone wall|in the toy chest|under the garden bench|in the basket|"
    "next to the well|behind the curtain|under the stairs"
).split("|")
_FOODS = (
    "apple cake|honey bun|jar of plum jam|bowl of carrot soup|berry pie|cheese sandwich|pumpkin muffin|corn muffin|pear tart|"
    "oat cookie|banana pancake|lemon cake|cherry pie|nut roll"
).split("|")
_WEATHER = "sunny rainy windy cloudy snowy foggy warm cold".split()
_MOODS = "happy proud glad cheerful thankful calm brave excited".split()
_LOW_MOODS = "sad worried upset lonely scared tired cross shy".split()
_SIZES = "little big tiny old new shiny soft round pretty funny heavy smooth".split()
_KIN = "mother father grandmother grandfather aunt uncle teacher neighbour".split()


class _Story:
    """The people and things of one story, drawn once, so that every sentence agrees with the others."""

    def __init__(self, draw: random.Random):
        self.draw = draw
        hero_is_girl = draw.random() < 0.5
        self.hero = draw.choice(_GIRLS if hero_is_girl else _BOYS)
        self.she, self.her, self.girl = ("she", "her", "girl") if hero_is_girl else ("he", "his", "boy")
        self.object_her = "her" if hero_is_girl else "him"
        self.friend = draw.choice([name for name in _GIRLS + _BOYS if name != self.hero])
        self.animal, self.pet = draw.choice(_ANIMALS), draw.choice(_PET_NAMES)
        self.kin = draw.choice(_KIN)
        self.colour, self.other_colour = draw.sample(_COLOURS, 2)
        self.thing, self.other_thing = draw.sample(_THINGS, 2)
        self.size = draw.choice(_SIZES)
        self.place, self.other_place = draw.sample(_PLACES, 2)
        self.hiding_place, self.wrong_place = draw.sample(_HIDING_PLACES, 2)
        self.food = draw.choice(_FOODS)
        self.weather = draw.choice(_WEATHER)
        self.mood, self.low_mood = draw.choice(_MOODS), draw.choice(_LOW_MOODS)
        self.number = draw.choice(["two", "three", "four", "five", "six", "seven"])

    def say(self, *wordings: str) -> str:
        """One of several wordings, its fields filled in from this story."""
        sentences = self.draw.choice(wordings).format_map(vars(self))
        return _SENTENCE_START.sub(lambda start: start.group().upper(), sentences)


def stories(split: str, count: int) -> Iterator[str]:
    """The first ``count`` stories of a split (``train`` or ``validation``).

    A story depends on the split and its own number only, so a larger count adds stories and changes none.
    """
    for number in range(count):
        yield _tell(random.Random(f"seqmodels toy {VERSION} {split} {number}"))


def _tell(draw: random.Random) -> str:
    story = _Story(draw)
    plots = draw.sample(_PLOTS, 2)
    beginnings, endings = zip(*(plot(story) for plot in plots), strict=True)
    between = [filler(story) for filler in draw.sample(_FILLERS, draw.choice([1, 2, 2, 3]))]
    if draw.random() < 0.5:  # the questions come in the order of the plots, or the other way round
        endings = endings[::-1]
    paragraphs = [
        f"{_opening(story)} {beginnings[0]}",
        f"{between[0]} {beginnings[1]}",
        *between[1:],
        endings[0],
        f"{endings[1]} {_closing(story)}",
    ]
    return _ARTICLE.sub(r"\1n ", "\n".join(paragraphs))


def _opening(story: _Story) -> str:
    return " ".join([
        story.say(
            "once upon a time, there was a {size} {girl} named {hero}.",
            "one {weather} day, a {girl} named {hero} woke up early.",
            "{hero} was a {size} {girl} who lived near the {place}.",
            "there once was a {girl} called {hero}, who had a {animal} called {pet}.",
            "in a house by the {place} lived a {girl} named {hero}.",
        ),
        story.say(
            "{she} loved to play at the {place} with {her} friend {friend}.",
            "{her} best friend was {friend}, and they met at the {place} every day.",
            "{she} liked the {place}, and {friend} liked it too.",
            "every morning {she} walked to the {place} to see {friend}.",
            "{she} and {friend} did everything together.",
        ),
    ])


def _hidden_thing(story: _Story) -> tuple[str, str]:
    begin = story.say(
        "{hero} had a {colour} {thing}. {she} hid it {hiding_place}, so that nobody would find it.",
        "{she} had a new toy, a {colour} {thing}, and put it {hiding_place}.",
        '"I will keep my {colour} {thing} {hiding_place}," said {hero}. "It is safe there."',
        "before breakfast, {hero} took the {colour} {thing} and laid it {hiding_place}.",
    )
    end = story.say(
        '"Where is your {thing}?" asked {friend}. They looked {wrong_place}, but it was not there. Then {hero} '
        "remembered. It was {hiding_place}! The {thing} was still as {colour} as before.",
        'Then {hero} wanted to play with the {thing}. "I know where it is," {she} said. {she} looked {hiding_place}, '
        "and there was the {colour} {thing}.",
        '"Can we play with the {colour} {thing}?" asked {friend}. "Yes," said {hero}. "It is {hiding_place}." '
        "{friend} ran to get it.",
        "at last it was time to get the {thing}. {hero} did not look {wrong_place}. {she} looked {hiding_place}, "
        "because {she} had hidden it there.",
    )
    return begin, end


def _present(story: _Story) -> tuple[str, str]:
    begin = story.say(
        "{her} {kin} gave {object_her} a {size} {other_colour} {other_thing}. {hero} was so {mood}!",
        '"This is for you," said {her} {kin}. It was a {other_colour} {other_thing}.',
        "that day {hero} got a present from {her} {kin}. In the box was a {other_colour} {other_thing}.",
        "{hero} opened a box. Inside was a {other_colour} {other_thing} from {her} {kin}.",
    )
    end = story.say(
        '"Who gave you the {other_thing}?" asked {friend}. "My {kin} did," said {hero}. "It is {other_colour}, '
        'just as I like it."',
        "{hero} showed the {other_colour} {other_thing} to {friend}. \"I got it from my {kin},\" {she} said.",
        "in the evening {hero} went to {her} {kin} and said, \"Thank you for the {other_colour} {other_thing}!\"",
        'They met the {kin} of {hero}. "Do you like the {other_thing}?" the {kin} asked. "Oh yes," said {hero}, '
        '"{other_colour} is the best!"',
    )
    return begin, end


def _promise(story: _Story) -> tuple[str, str]:
    begin = story.say(
        '"I will bring you a {food} tomorrow," said {friend}. "That is a promise."',
        "{friend} promised to share a {food} with {hero} later.",
        '"If you help me at the {other_place}, you will get a {food}," said {friend}.',
        "{hero} was hungry. {friend} said that there would be a {food} at home.",
    )
    end = story.say(
        '{friend} did not forget. "Here is your {food}," said {friend}, and they ate it together.',
        "then {friend} came with a {food}, just as promised. It was so good that {hero} asked for more.",
        '"What did you promise me?" asked {hero}. "A {food}!" said {friend}, and took it out of the bag.',
        "a promise is a promise. {friend} gave {hero} the {food}, and both of them smiled.",
    )
    return begin, end


def _lost_pet(story: _Story) -> tuple[str, str]:
    begin = story.say(
        "{hero} had a {animal} named {pet}. But {pet} had run away to the {other_place}.",
        "that morning the {animal} was gone. \"{pet}! {pet}!\" called {hero}. Nobody came from the {other_place}.",
        "a {size} {animal} named {pet} followed {hero} everywhere, but at the {other_place} they lost each other.",
        "at the {other_place} {hero} met a {animal}. \"My name is {pet},\" it said. Then it ran off.",
    )
    end = story.say(
        'They went back to the {other_place}. "Look, there is {pet}!" cried {friend}. The {animal} jumped and ran to {hero}.',
        "just then something moved. It was {pet}, the {animal}! It had waited at the {other_place} all day.",
        '"Have you seen a {animal}?" asked {hero}. "Is its name {pet}?" said a man. "It is at the {other_place}." '
        "So they found it.",
        "{hero} heard a sound from the {other_place}. The {animal} came out. \"{pet}!\" said {hero}. \"There you are!\"",
    )
    return begin, end


def _counting(story: _Story) -> tuple[str, str]:
    begin = story.say(
        "{hero} had {number} stones in {her} pocket and counted them again and again.",
        "on the way {hero} found {number} nuts and put them in {her} bag.",
        "{friend} gave {hero} {number} flowers to carry.",
    )
    end = story.say(
        '"How many do you have?" asked {friend}. {hero} counted. There were still {number}.',
        "{hero} looked at what {she} had carried all day. Not one was lost: there were {number}.",
        '"Are all {number} there?" asked {friend}. "Yes, all {number}," said {hero}.',
    )
    return begin, end


def _weather_filler(story: _Story) -> str:
    return story.say(
        "the day was {weather}, and the wind sang in the trees.",
        "it was a {weather} day, so {hero} put on a coat. Step by step they walked on.",
        "outside it was {weather}. The birds flew over the {place} and sang a song.",
    )


def _helping_filler(story: _Story) -> str:
    return story.say(
        "on the road they met an old man who could not lift his bag. {hero} helped him, and he said thank you.",
        "at the {place} a baby bird had fallen from its nest. {hero} and {friend} put it back with care.",
        "a woman had lost her way. \"The {place} is over there,\" said {friend}. The woman was {mood}.",
        "{friend} fell and was {low_mood}. {hero} gave {friend} a hug, and soon it was all right.",
    )


def _playing_filler(story: _Story) -> str:
    return story.say(
        "{hero} and {friend} ran and jumped at the {place} until they were tired.",
        "they played a game. {friend} closed both eyes and counted to ten, and {hero} laughed.",
        "they climbed a hill and looked down at the {place}. Everything looked so small.",
        "they sang a song, first loud and then very quiet, and the {place} was full of it.",
    )


def _trouble_filler(story: _Story) -> str:
    return story.say(
        "but a big dog barked at them. {hero} was {low_mood}, but {friend} was brave and said, \"Go home, dog!\"",
        "then it began to rain. They hid in a small house and waited, and {hero} felt {low_mood}.",
        "suddenly the road ended. \"Which way now?\" asked {hero}. \"Left,\" said {friend}, and {friend} was right.",
        "{friend} wanted to stop, but {hero} said, \"Let us try one more time.\" So they tried again.",
    )


def _closing(story: _Story) -> str:
    return story.say(
        "{hero} and {friend} went home, and they were {mood}.",
        "that night {hero} told {her} {kin} about {friend} and the {place}. Then {she} fell asleep.",
        "from that day on, {hero} and {friend} were even better friends. The end.",
        "{hero} learned that it is good to have a friend like {friend}.",
        '"This was the best day at the {place}," said {friend}. {hero} thought so too.',
        "and so {hero} felt {mood} again, and never forgot that {weather} day.",
    )


_PLOTS: Final = (_hidden_thing, _present, _promise, _lost_pet, _counting)
_FILLERS: Final = (_weather_filler, _helping_filler, _playing_filler, _trouble_filler)
_SENTENCE_START = re.compile(r"^[a-z]|(?<=[.!?] )[a-z]")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")
