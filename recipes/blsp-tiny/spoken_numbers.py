"""Numbers as they are spoken, and sentences full of them: times, dates, prices, spelled letters.

In: integers, or a count of sentences and nothing else. Out: English words.
Where in the flow: below `build_texts.py`; the clips of the packages hold few numbers, people say many.

Try: `number_words(1976)` is "one thousand nine hundred and seventy six".
"""

from __future__ import annotations

from random import Random

ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
    "eleventh", "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth",
    "eighteenth", "nineteenth", "twentieth",
)  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
)  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
THINGS = (
    "tickets", "boxes", "pages", "miles", "people", "chairs", "bottles", "houses", "letters", "minutes",
    "dollars", "apples", "books", "pounds",
)  # fmt: skip


def number_words(value: int) -> str:
    """0 to 999,999."""
    if value < 20:
        return ONES[value]
    if value < 100:
        return TENS[value // 10] + (f" {ONES[value % 10]}" if value % 10 else "")
    if value < 1000:
        rest = f" and {number_words(value % 100)}" if value % 100 else ""
        return f"{ONES[value // 100]} hundred{rest}"
    rest = f" {number_words(value % 1000)}" if value % 1000 else ""
    return f"{number_words(value // 1000)} thousand{rest}"


def number_sentences(count: int, seed: int = 0) -> list[str]:
    random = Random(f"numbers {seed}")
    makers = (_amount, _time, _date, _price, _phone, _spelling, _year, _order)
    return list(dict.fromkeys(random.choice(makers)(random) for _ in range(count)))


def _amount(random: Random) -> str:
    value = random.choice([random.randint(2, 30), random.randint(30, 999), random.randint(1000, 99_999)])
    opening = random.choice(["There were", "We counted", "They sold", "She needs", "I have", "He asked for"])
    return f"{opening} {number_words(value)} {random.choice(THINGS)}."


def _time(random: Random) -> str:
    hour, minute = random.randint(1, 12), random.randint(1, 59)
    clock = f"{number_words(hour)} {'oh ' if minute < 10 else ''}{number_words(minute)}"
    opening = random.choice(["It is", "The train leaves at", "Meet me at", "Wake me up at", "The shop closes at"])
    return f"{opening} {clock} {random.choice(['in the morning', 'in the evening', 'today', 'tomorrow'])}."


def _date(random: Random) -> str:
    day = random.choice([*ORDINALS, "twenty first", "twenty third", "twenty fifth", "thirtieth", "thirty first"])
    opening = random.choice(["We will meet on", "Her birthday is on", "The meeting is on", "They arrived on"])
    return f"{opening} {random.choice(DAYS)}, the {day} of {random.choice(MONTHS)}."


def _price(random: Random) -> str:
    opening = random.choice(["That costs", "The bill comes to", "You owe me", "I paid"])
    dollars, cents = number_words(random.randint(1, 200)), number_words(random.randint(2, 99))
    return f"{opening} {dollars} dollars and {cents} cents."


def _phone(random: Random) -> str:
    digits = " ".join(random.choice(ONES[:10]) for _ in range(random.randint(3, 7)))
    opening = random.choice(["My number is", "Please dial", "The code is", "Call extension", "Room number"])
    return f"{opening} {digits}."


def _spelling(random: Random) -> str:
    letters = " ".join(random.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(random.randint(2, 5)))
    return f"{random.choice(['It is spelled', 'The letters are', 'Type', 'Her initials are'])} {letters}."


def _year(random: Random) -> str:
    first, second = random.randint(14, 20), random.randint(10, 99)
    opening = random.choice(["It happened in", "The house was built in", "He was born in", "The war ended in"])
    return f"{opening} {number_words(first)} {number_words(second)}."


def _order(random: Random) -> str:
    place = random.choice(ORDINALS)
    opening = random.choice(["She came", "He finished", "They were"])
    return f"{opening} {place} out of {number_words(random.randint(21, 99))}."
