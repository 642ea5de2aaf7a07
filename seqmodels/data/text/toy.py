"""Simple stories from a seeded generator: text to learn from without a network or a download.

Each story binds names, colours, things and places early and asks for them later: a thing hidden in
one place is looked for after something else has happened, a present is remembered with its giver, a
promise is kept with the very food that was promised. A model that forgets the beginning cannot
predict those words, so what separates architectures on real stories separates them here. The text is
our own and under this repository's licence.
"""

import random
import re
from collections.abc import Iterator, Sequence
from typing import Final

VERSION: Final = 1
"""Part of the key of cached tokens: raise it when any story changes."""

VALIDATION_DOCUMENTS: Final = 200
MEAN_BYTES: Final = 660
"""Of a story, about."""

_GIRLS: Final = ("Anna Bella Clara Daisy Ella Fay Grace Holly Ivy June Kate Lily Mia Nora Olive Penny Rose Sara Tess Zoe").split()
_BOYS: Final = ("Adam Ben Carl Dan Eli Finn Gus Henry Ian Jack Kit Leo Max Ned Oscar Paul Ray Sam Tom Will").split()
_COLOURS: Final = "red blue green yellow purple orange pink white black brown golden silver".split()
_THINGS: Final = (
    "ball kite drum doll truck boat book box bell hat scarf key lamp cup robot puzzle crown mask shovel "
    "bucket whistle ribbon blanket balloon button coin feather shell marble mitten"
).split()
_ANIMALS: Final = ("dog cat rabbit duck frog pony lamb goat mouse owl fox bear turtle squirrel hen puppy kitten bird").split()
_PETS: Final = ("Spot Fluffy Pip Coco Biscuit Pepper Snowy Buddy Muffin Ginger Dot Bruno Socks Honey Patch Momo").split()
_PLACES: Final = (
    "park garden forest beach farm market school library meadow playground village zoo lake hill river orchard"
).split()
_HIDING_PLACES: Final = (
    "under the bed",
    "behind the old tree",
    "in the tall grass",
    "under the wooden bridge",
    "inside the empty barrel",
    "behind the kitchen door",
    "on the top shelf",
    "under a pile of leaves",
    "in the flower pot",
    "beside the pond",
    "inside the hollow log",
    "behind the stone wall",
    "in the toy chest",
    "under the garden bench",
    "in the basket",
    "next to the well",
    "behind the curtain",
    "under the stairs",
)
_FOODS: Final = (
    "apple cake",
    "honey bun",
    "jar of plum jam",
    "bowl of carrot soup",
    "berry pie",
    "cheese sandwich",
    "pumpkin muffin",
    "corn muffin",
    "pear tart",
    "oat cookie",
    "banana pancake",
    "lemon cake",
    "cherry pie",
    "nut roll",
)
_WEATHER: Final = "sunny rainy windy cloudy snowy foggy warm cold".split()
_MOODS: Final = "happy proud glad cheerful thankful calm brave excited".split()
_LOW_MOODS: Final = "sad worried upset lonely scared tired cross shy".split()
_SIZES: Final = "little big tiny old new shiny soft round pretty funny heavy smooth".split()
_KIN: Final = "mother father grandmother grandfather aunt uncle teacher neighbour".split()
_NUMBERS: Final = "two three four five six seven".split()

# Every table below holds wordings of the same thing, of which a story uses one.
_OPENINGS: Final = (
    "Once upon a time, there was a {size} {girl} named {hero}.",
    "One {weather} day, a {girl} named {hero} woke up early.",
    "{hero} was a {size} {girl} who lived near the {place}.",
    "There once was a {girl} called {hero}, who had a {animal} called {pet}.",
    "In a house by the {place} lived a {girl} named {hero}.",
)
_FRIENDS: Final = (
    "{She} loved to play at the {place} with {her} friend {friend}.",
    "{Her} best friend was {friend}, and they met at the {place} every day.",
    "{She} liked the {place}, and {friend} liked it too.",
    "Every morning {she} walked to the {place} to see {friend}.",
    "{She} and {friend} did everything together.",
)
# A plot is how it begins, and how it comes back later in the story.
_HIDDEN_THING: Final = (
    (
        "{hero} had a {colour} {thing}. {She} hid it {hiding_place}, so that nobody would find it.",
        "{She} had a new toy, a {colour} {thing}, and put it {hiding_place}.",
        '"I will keep my {colour} {thing} {hiding_place}," said {hero}. "It is safe there."',
        "Before breakfast, {hero} took the {colour} {thing} and laid it {hiding_place}.",
    ),
    (
        '"Where is your {thing}?" asked {friend}. They looked {wrong_place}, but it was not there. '
        "Then {hero} remembered. It was {hiding_place}! The {thing} was still as {colour} as before.",
        'Then {hero} wanted to play with the {thing}. "I know where it is," {she} said. '
        "{She} looked {hiding_place}, and there was the {colour} {thing}.",
        '"Can we play with the {colour} {thing}?" asked {friend}. "Yes," said {hero}. '
        '"It is {hiding_place}." {friend} ran to get it.',
        "At last it was time to get the {thing}. {hero} did not look {wrong_place}. "
        "{She} looked {hiding_place}, because {she} had hidden it there.",
    ),
)
_PRESENT: Final = (
    (
        "{Her} {kin} gave {him} a {size} {other_colour} {other_thing}. {hero} was so {mood}!",
        '"This is for you," said {her} {kin}. It was a {other_colour} {other_thing}.',
        "That day {hero} got a present from {her} {kin}. In the box was a {other_colour} {other_thing}.",
        "{hero} opened a box. Inside was a {other_colour} {other_thing} from {her} {kin}.",
    ),
    (
        '"Who gave you the {other_thing}?" asked {friend}. "My {kin} did," said {hero}. '
        '"It is {other_colour}, just as I like it."',
        '{hero} showed the {other_colour} {other_thing} to {friend}. "I got it from my {kin}," {she} said.',
        'In the evening {hero} went to {her} {kin} and said, "Thank you for the {other_colour} {other_thing}!"',
        'They met the {kin} of {hero}. "Do you like the {other_thing}?" the {kin} asked. '
        '"Oh yes," said {hero}, "{other_colour} is the best!"',
    ),
)
_PROMISE: Final = (
    (
        '"I will bring you a {food} tomorrow," said {friend}. "That is a promise."',
        "{friend} promised to share a {food} with {hero} later.",
        '"If you help me at the {other_place}, you will get a {food}," said {friend}.',
        "{hero} was hungry. {friend} said that there would be a {food} at home.",
    ),
    (
        '{friend} did not forget. "Here is your {food}," said {friend}, and they ate it together.',
        "Then {friend} came with a {food}, just as promised. It was so good that {hero} asked for more.",
        '"What did you promise me?" asked {hero}. "A {food}!" said {friend}, and took it out of the bag.',
        "A promise is a promise. {friend} gave {hero} the {food}, and both of them smiled.",
    ),
)
_LOST_PET: Final = (
    (
        "{hero} had a {animal} named {pet}. But {pet} had run away to the {other_place}.",
        'That morning the {animal} was gone. "{pet}! {pet}!" called {hero}. Nobody came from the {other_place}.',
        "A {size} {animal} named {pet} followed {hero} everywhere, but at the {other_place} they lost each other.",
        'At the {other_place} {hero} met a {animal}. "My name is {pet}," it said. Then it ran off.',
    ),
    (
        'They went back to the {other_place}. "Look, there is {pet}!" cried {friend}. The {animal} jumped and ran to {hero}.',
        "Just then something moved. It was {pet}, the {animal}! It had waited at the {other_place} all day.",
        '"Have you seen a {animal}?" asked {hero}. "Is its name {pet}?" said a man. '
        '"It is at the {other_place}." So they found it.',
        '{hero} heard a sound from the {other_place}. The {animal} came out. "{pet}!" said {hero}. "There you are!"',
    ),
)
_COUNTING: Final = (
    (
        "{hero} had {number} stones in {her} pocket and counted them again and again.",
        "On the way {hero} found {number} nuts and put them in {her} bag.",
        "{friend} gave {hero} {number} flowers to carry.",
    ),
    (
        '"How many do you have?" asked {friend}. {hero} counted. There were still {number}.',
        "{hero} looked at what {she} had carried all day. Not one was lost: there were {number}.",
        '"Are all {number} there?" asked {friend}. "Yes, all {number}," said {hero}.',
    ),
)
_PLOTS: Final = (_HIDDEN_THING, _PRESENT, _PROMISE, _LOST_PET, _COUNTING)
# What happens between the beginning of a plot and its end.
_DISTRACTIONS: Final = (
    (
        "The day was {weather}, and the wind sang in the trees.",
        "It was a {weather} day, so {hero} put on a coat. Step by step they walked on.",
        "Outside it was {weather}. The birds flew over the {place} and sang a song.",
    ),
    (
        "On the road they met an old man who could not lift his bag. {hero} helped him, and he said thank you.",
        "At the {place} a baby bird had fallen from its nest. {hero} and {friend} put it back with care.",
        'A woman had lost her way. "The {place} is over there," said {friend}. The woman was {mood}.',
        "{friend} fell and was {low_mood}. {hero} gave {friend} a hug, and soon it was all right.",
    ),
    (
        "{hero} and {friend} ran and jumped at the {place} until they were tired.",
        "They played a game. {friend} closed both eyes and counted to ten, and {hero} laughed.",
        "They climbed a hill and looked down at the {place}. Everything looked so small.",
        "They sang a song, first loud and then very quiet, and the {place} was full of it.",
    ),
    (
        'But a big dog barked at them. {hero} was {low_mood}, but {friend} was brave and said, "Go home, dog!"',
        "Then it began to rain. They hid in a small house and waited, and {hero} felt {low_mood}.",
        'Suddenly the road ended. "Which way now?" asked {hero}. "Left," said {friend}, and {friend} was right.',
        '{friend} wanted to stop, but {hero} said, "Let us try one more time." So they tried again.',
    ),
)
_CLOSINGS: Final = (
    "{hero} and {friend} went home, and they were {mood}.",
    "That night {hero} told {her} {kin} about {friend} and the {place}. Then {she} fell asleep.",
    "From that day on, {hero} and {friend} were even better friends. The end.",
    "{hero} learned that it is good to have a friend like {friend}.",
    '"This was the best day at the {place}," said {friend}. {hero} thought so too.',
    "And so {hero} felt {mood} again, and never forgot that {weather} day.",
)

_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")


def stories(split: str, count: int) -> Iterator[str]:
    """The first ``count`` stories of a split (``train`` or ``validation``).

    A story depends on the split and its own number only, so a larger count adds stories and changes none.
    """
    for number in range(count):
        yield _story(random.Random(f"seqmodels toy {VERSION} {split} {number}"))


def _story(draw: random.Random) -> str:
    cast = _cast(draw)

    def say(wordings: Sequence[str]) -> str:
        return draw.choice(wordings).format_map(cast)

    first, second = draw.sample(_PLOTS, 2)
    between = draw.sample(_DISTRACTIONS, draw.choice([1, 2, 2, 3]))
    paragraphs = [
        f"{say(_OPENINGS)} {say(_FRIENDS)} {say(first[0])}",
        f"{say(between[0])} {say(second[0])}",
        *map(say, between[1:]),
    ]
    # The plots come back in their order, or the other way round.
    last, last_but_one = (first, second) if draw.random() < 0.5 else (second, first)
    paragraphs += [say(last_but_one[1]), f"{say(last[1])} {say(_CLOSINGS)}"]
    return _ARTICLE.sub(r"\1n ", "\n".join(paragraphs))


def _cast(draw: random.Random) -> dict[str, str]:
    """The people and things of one story, so that all of its sentences agree."""
    hero_is_girl = draw.random() < 0.5
    hero = draw.choice(_GIRLS if hero_is_girl else _BOYS)
    colour, other_colour = draw.sample(_COLOURS, 2)
    thing, other_thing = draw.sample(_THINGS, 2)
    place, other_place = draw.sample(_PLACES, 2)
    hiding_place, wrong_place = draw.sample(_HIDING_PLACES, 2)
    return {
        "hero": hero,
        "friend": draw.choice([name for name in _GIRLS + _BOYS if name != hero]),
        "girl": "girl" if hero_is_girl else "boy",
        "she": "she" if hero_is_girl else "he",
        "She": "She" if hero_is_girl else "He",
        "her": "her" if hero_is_girl else "his",
        "Her": "Her" if hero_is_girl else "His",
        "him": "her" if hero_is_girl else "him",
        "animal": draw.choice(_ANIMALS),
        "pet": draw.choice(_PETS),
        "kin": draw.choice(_KIN),
        "colour": colour,
        "other_colour": other_colour,
        "thing": thing,
        "other_thing": other_thing,
        "place": place,
        "other_place": other_place,
        "hiding_place": hiding_place,
        "wrong_place": wrong_place,
        "size": draw.choice(_SIZES),
        "food": draw.choice(_FOODS),
        "weather": draw.choice(_WEATHER),
        "mood": draw.choice(_MOODS),
        "low_mood": draw.choice(_LOW_MOODS),
        "number": draw.choice(_NUMBERS),
    }
