"""Questions with short answers, simple enough for a very small language model, as tables.

In: nothing. Out: `Question`s with every accepted answer and three wrong ones of the same kind.
Where in the flow: `build_texts.py` splits them by hash; the training half is spoken to train on, the
evaluation half by the held-out voices (`eval_data.py`).

Try: `quiz()[0]`
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rows import fraction
from spoken_numbers import number_words

CAPITALS = """\
France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Greece Athens, Russia Moscow, Japan
Tokyo, China Beijing, Egypt Cairo, Canada Ottawa, Mexico Mexico_City, Cuba Havana, Peru Lima, Chile
Santiago, Kenya Nairobi, Sweden Stockholm, Norway Oslo, Denmark Copenhagen, Finland Helsinki, Poland Warsaw,
Austria Vienna, Hungary Budapest, Ireland Dublin, Scotland Edinburgh, England London, Belgium Brussels,
Turkey Ankara, Iran Tehran, Iraq Baghdad, India New_Delhi, Thailand Bangkok, Vietnam Hanoi, Cambodia
Phnom_Penh, Indonesia Jakarta, Cuba Havana, South_Korea Seoul, Argentina Buenos_Aires, Colombia Bogota,
Ukraine Kyiv, Romania Bucharest, Bulgaria Sofia, Serbia Belgrade, Croatia Zagreb, Morocco Rabat, Jamaica
Kingston, Nepal Kathmandu, Mongolia Ulaanbaatar, Iceland Reykjavik, Lebanon Beirut, Syria Damascus, Ethiopia
Addis_Ababa, Ghana Accra, Nigeria Abuja, Australia Canberra"""
OPPOSITES = """\
hot cold, big small/little, up down, left right, day night, good bad, happy sad/unhappy, fast slow, rich
poor, old young/new, open closed/close, black white, hard soft/easy, light dark/heavy, long short, high low,
early late, empty full, wet dry, clean dirty, strong weak, loud quiet, near far, true false, right
wrong/left, love hate, war peace, win lose, begin end/finish, life death, north south, east west,
summer winter, sweet sour/bitter, thick thin, wide narrow, deep shallow, smooth rough, tall short, brave
cowardly, first last, inside outside, above below, before after, always never, buy sell, push pull, laugh
cry, remember forget, accept reject/refuse, arrive depart/leave, success failure, friend enemy, sunrise
sunset, positive negative, expensive cheap, noisy quiet/silent, ugly beautiful"""
COLORS = """\
grass green, snow white, blood red, coal black, a_banana yellow, a_lemon yellow, the_sky blue, the_sun
yellow, an_orange orange, a_carrot orange, chocolate brown, milk white, a_strawberry red, a_tomato red,
an_emerald green, a_ruby red, a_polar_bear white, a_crow black, a_cucumber green, a_fire_truck red,
a_sunflower yellow, broccoli green, a_cherry red, a_sapphire blue, cotton white, a_frog green, the_ocean
blue, a_pumpkin orange, a_school_bus yellow"""
COUNTS = """\
days are in a week=7; months are in a year=12; hours are in a day=24; minutes are in an hour=60; seconds are
in a minute=60; legs does a spider have=8; legs does an insect have=6; legs does a dog have=4; sides does a
triangle have=3; sides does a square have=4; wheels does a bicycle have=2; wheels does a car have=4; wheels
does a tricycle have=3; fingers are on one hand=5; letters are in the English alphabet=26; continents are
there on Earth=7; planets are in our solar system=8; years are in a decade=10; years are in a century=100;
arms does an octopus have=8; eyes does a person have=2; weeks are in a year=52; days are in a leap year=366;
sides does a hexagon have=6; sides does an octagon have=8; sides does a pentagon have=5; states are in the
United States=50; seasons are in a year=4; toes do people have=10; players are on a soccer team=11; inches
are in a foot=12; feet are in a yard=3; cents are in a dollar=100; strings does a violin have=4; strings
does a guitar have=6; wings does a butterfly have=4; items are in a dozen=12"""
LANGUAGES = """\
France French, Germany German, Italy Italian, Spain Spanish, Portugal Portuguese, Greece Greek, Russia
Russian, Japan Japanese, China Chinese/Mandarin, Brazil Portuguese, Mexico Spanish, Argentina Spanish, Cuba
Spanish, Sweden Swedish, Norway Norwegian, Denmark Danish, Finland Finnish, Poland Polish, Hungary
Hungarian, Austria German, England English, Australia English, Turkey Turkish, Egypt Arabic, Thailand Thai,
Vietnam Vietnamese, Colombia Spanish, Iran Persian/Farsi, Saudi_Arabia Arabic, Peru Spanish, South_Korea
Korean, Ukraine Ukrainian, Jamaica English"""
CONTINENTS = """\
France Europe, Germany Europe, Italy Europe, Spain Europe, Poland Europe, Sweden Europe, Norway Europe,
Greece Europe, Portugal Europe, Austria Europe, Hungary Europe, China Asia, Japan Asia, India Asia, Thailand
Asia, Vietnam Asia, Nepal Asia, Mongolia Asia, Pakistan Asia, Indonesia Asia, Egypt Africa, Kenya Africa,
Nigeria Africa, Morocco Africa, Ghana Africa, Ethiopia Africa, South_Africa Africa, Algeria Africa, Brazil
South_America, Peru South_America, Chile South_America, Argentina South_America, Colombia South_America,
Bolivia South_America, Canada North_America, Mexico North_America, Belgium Europe, Denmark Europe, Finland
Europe, Uganda Africa, Tanzania Africa"""
PLURALS = """\
mouse mice, child children, foot feet, tooth teeth, goose geese, man men, woman women, knife knives, leaf
leaves, wolf wolves, life lives, box boxes, city cities, baby babies, ox oxen, person people, dog dogs, cat
cats, church churches, tomato tomatoes, party parties, shelf shelves, glass glasses, bus buses, country
countries"""
PAST = """\
go went, see saw, eat ate, run ran, write wrote, speak spoke, take took, give gave, come came, buy bought,
think thought, bring brought, sing sang, swim swam, drink drank, begin began, fly flew, grow grew, know
knew, teach taught, catch caught, break broke, drive drove, fall fell, sleep slept, win won, find found,
walk walked, play played"""
MAKERS = """\
Who wrote Romeo and Juliet?=Shakespeare; Who wrote Hamlet?=Shakespeare; Who painted the Mona
Lisa?=Leonardo/da Vinci; Who painted the Starry Night?=van Gogh; Who was the first man on the
moon?=Armstrong; Who was the first president of the United States?=Washington; Who invented the
telephone?=Bell; Who invented the light bulb?=Edison; Who developed the theory of relativity?=Einstein; Who
discovered gravity?=Newton; Who wrote Pride and Prejudice?=Austen; Who wrote Oliver Twist?=Dickens; Who
wrote the Odyssey?=Homer; Who wrote War and Peace?=Tolstoy; Who discovered penicillin?=Fleming; Who wrote
the Origin of Species?=Darwin; Who composed the Four Seasons?=Vivaldi; Who painted the ceiling of the
Sistine Chapel?=Michelangelo; Who wrote the Harry Potter books?=Rowling; Who wrote The Lord of the
Rings?=Tolkien; Who invented the printing press?=Gutenberg; Who invented the airplane?=Wright; Who wrote
Frankenstein?=Shelley; Who discovered America in fourteen ninety two?=Columbus; Who wrote The Adventures of
Tom Sawyer?=Twain/Clemens"""
FACTS = """\
What gas do people need to breathe?=oxygen; What planet do we live on?=Earth; What is the largest planet in
our solar system?=Jupiter; What is the largest ocean on Earth?=Pacific; What is the longest river in
Africa?=Nile; What is the tallest mountain in the world?=Everest; What is the largest animal on
Earth?=whale; What is the fastest land animal?=cheetah; What is the tallest animal in the world?=giraffe;
What is the closest star to the Earth?=Sun; What is frozen water called?=ice; What do bees make?=honey; What
animal says moo?=cow; What animal barks?=dog; What is a baby dog called?=puppy; What is a baby cat
called?=kitten; What is a baby cow called?=calf; What is a baby sheep called?=lamb; What is a baby horse
called?=foal/colt/filly; What do cows produce that we drink?=milk; What is the main ingredient of
bread?=flour/wheat; What fruit is used to make wine?=grape/grapes; What fruit is used to make
cider?=apple/apples; What is the capital city of the United States?=Washington; Which planet is known as the
red planet?=Mars; Which planet has rings?=Saturn; What is the hardest natural substance?=diamond; What is
the center of an atom called?=nucleus; What organ pumps blood through the body?=heart; What organ do we use
to think?=brain; What organ do we use to see?=eye/eyes; What is the largest organ of the human body?=skin;
What is the first month of the year?=January; What is the last month of the year?=December; In which month
is Christmas?=December; In which month is Halloween?=October; What is the first day of the
week?=Sunday/Monday; What is the season after winter?=spring; What is the season after summer?=autumn/fall;
What is the coldest season of the year?=winter; What do we call a person who teaches?=teacher; What do we
call a person who flies a plane?=pilot; What do we call a person who bakes bread?=baker; Where do fish
live?=water/ocean/sea; What do you use to cut paper?=scissors; What do you use to write on a
blackboard?=chalk; What do plants need from the sun?=light/sunlight/energy; What metal is a magnet attracted
to?=iron; What is the process by which plants make food?=photosynthesis; What is the freezing point of water
in degrees Celsius?=0/zero; What is the largest desert in Africa?=Sahara; What is the largest country in the
world?=Russia; What is the smallest continent?=Australia; What is the largest continent?=Asia; What force
pulls things to the ground?=gravity; What is the currency of Japan?=yen; What is the currency of the United
States?=dollar/dollars; What is the currency of Great Britain?=pound/pounds/sterling; What is the currency
of India?=rupee/rupees; What is the currency of Germany?=euro/euros; What is the currency of
Mexico?=peso/pesos; What is the currency of China?=yuan/renminbi; What sport is played at Wimbledon?=tennis;
What instrument has eighty eight keys?=piano; What is the study of living things called?=biology; What is
the study of the stars and planets called?=astronomy; What does a thermometer measure?=temperature; What
does a clock measure?=time; What language did the ancient Romans speak?=Latin; In which country are the
pyramids of Giza?=Egypt; In which country is the Eiffel Tower?=France; In which country is the Great
Wall?=China; In which country is the Taj Mahal?=India; In which city is the Colosseum?=Rome; In which city
is the Statue of Liberty?=New York; In which city is Big Ben?=London; What do you call the father of your
father?=grandfather/grandpa; What do you call the sister of your mother?=aunt; What do caterpillars turn
into?=butterfly/butterflies/moths; What animal is known as the king of the jungle?=lion; What do pandas
eat?=bamboo; What is the largest bird in the world?=ostrich; What bird cannot fly and lives in
Antarctica?=penguin; What color do you get when you mix blue and yellow?=green; What color do you get when
you mix red and white?=pink; What color do you get when you mix red and yellow?=orange; What vegetable makes
you cry when you cut it?=onion; What do we call frozen rain?=hail/sleet/snow; What is the chemical name of
table salt?=sodium chloride"""
WEEK = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    text: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...]
    table: str


def quiz() -> list[Question]:
    """All questions, every text once."""
    return list({question.text: question for table in TABLES for question in _questions(*table)}.values())


def _questions(table: str, rows: list[tuple[str, tuple[str, ...]]]) -> Iterator[Question]:
    every = sorted({answers[0] for _, answers in rows})
    for text, answers in rows:
        others = sorted((a for a in every if a not in answers), key=lambda a: fraction("wrong", text, a))
        yield Question(text, answers, tuple(others[:3]), table)


def _pairs(table: str, template: str) -> list[tuple[str, tuple[str, ...]]]:
    pairs = [entry.split() for entry in table.split(",")]
    return [
        (template.format(asked.replace("_", " ")), tuple(a.replace("_", " ") for a in answer.split("/")))
        for asked, answer in pairs
    ]


def _asked(table: str) -> list[tuple[str, tuple[str, ...]]]:
    entries = [" ".join(entry.split()).split("=") for entry in table.split(";")]
    return [(text, tuple(answer.split("/"))) for text, answer in entries]


def _number(value: int) -> tuple[str, str]:
    return number_words(value), str(value)


def _counts() -> list[tuple[str, tuple[str, ...]]]:
    return [(f"How many {text}?", _number(int(answers[0]))) for text, answers in _asked(COUNTS)]


def _sums() -> list[tuple[str, tuple[str, ...]]]:
    pairs = [(a, b) for a in range(1, 11) for b in range(1, 11) if fraction("sum", a, b) < 0.4]
    return [(f"What is {number_words(a)} plus {number_words(b)}?", _number(a + b)) for a, b in pairs]


def _next(names: tuple[str, ...], kind: str) -> list[tuple[str, tuple[str, ...]]]:
    after = zip(names, names[1:] + names[:1], strict=True)
    return [(f"What {kind} comes after {name}?", (following,)) for name, following in after]


TABLES = (
    ("capital", _pairs(CAPITALS, "What is the capital of {}?")),
    ("opposite", _pairs(OPPOSITES, "What is the opposite of {}?")),
    ("color", _pairs(COLORS, "What color is {}?")),
    ("count", _counts()),
    ("sum", _sums()),
    ("day", _next(WEEK, "day")),
    ("month", _next(MONTHS, "month")),
    ("language", _pairs(LANGUAGES, "What language do people speak in {}?")),
    ("continent", _pairs(CONTINENTS, "On which continent is {}?")),
    ("plural", _pairs(PLURALS, "What is the plural of {}?")),
    ("past", _pairs(PAST, "What is the past tense of {}?")),
    ("maker", _asked(MAKERS)),
    ("fact", _asked(FACTS)),
)
