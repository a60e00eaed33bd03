"""Units of measure, for the one thing that math-verify cannot see: it drops them, so 5 m is 5 cm to it, and 500 cm is not 5 m."""

import re
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction

_TABLE = {
    "length": "mm 1/1000, millimeter 1/1000, millimetre 1/1000, cm 1/100, centimeter 1/100, centimetre 1/100, dm 1/10, m 1, meter 1,"
    " metre 1, km 1000, kilometer 1000, kilometre 1000",
    "imperial length": "in 1, inch 1, ft 12, foot 12, feet 12, yd 36, yard 36, mi 63360, mile 63360",
    "time": "ms 1/1000, s 1, sec 1, second 1, min 60, minute 60, h 3600, hr 3600, hour 3600, day 86400, week 604800",
    "mass": "mg 1/1000, g 1, gram 1, kg 1000, kilogram 1000",
    "imperial mass": "oz 1, ounce 1, lb 16, pound 16",
    "volume": "ml 1/1000, mL 1/1000, milliliter 1/1000, L 1, l 1, liter 1, litre 1",
    "money": "cent 1/100, dollar 1, usd 1",
    "energy": "J 1, joule 1, kJ 1000",
    "power": "W 1, watt 1, kW 1000",
    "frequency": "Hz 1, hertz 1",
    "angle": "degree 1, deg 1",
}
_UNITS = {
    name: (kind, Fraction(factor)) for kind, entries in _TABLE.items() for name, factor in (entry.split() for entry in entries.split(", "))
}
_NO_UNIT = {"unit", "st", "nd", "rd", "th"}
_SPELLINGS = [
    (re.compile(r"\bmph\b"), "mile/hour"),
    (re.compile(r"\b(?:kmh|kph)\b"), "km/h"),
    (re.compile(r"\bper\b"), "/"),
    (re.compile(r"\b(?:square|sq) ([^\W\d]+)"), r"\1^2"),
    (re.compile(r"\b(?:cubic|cu) ([^\W\d]+)"), r"\1^3"),
    (re.compile(r" squared\b"), "^2"),
    (re.compile(r" cubed\b"), "^3"),
]

_BETWEEN = r"(?:[\s~/.]|\\[,;! ]|\\cdot(?![a-zA-Z]))*"
_NAME = r"\\(?:text|mathrm|textrm|mbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
_POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|\d))?"
_QUANTITY = re.compile(rf"(.*?[\w}})\]])((?:{_BETWEEN}{_NAME}{_POWER})+)", re.DOTALL)
_PLAIN_QUANTITY = re.compile(r"([+-]?[\d.,]*\d) ?([a-zA-Z]+(?:[ /*^-][a-zA-Z0-9]+)*)")  # 5 cm; the number alone: 3m+2s is an expression
_FACTOR = re.compile(r"(/)|([^\W\d_]+) ?\^? ?(-?\d)?")


@dataclass(frozen=True)
class _Unit:
    """A product of powers: of kinds of the table (m/s is length 1, time -1), and of words that are not in it."""

    factor: Fraction  # of the units of factor 1 of its kinds
    powers: Counter[str] = field(default_factory=Counter)

    @property
    def is_known(self) -> bool:
        return all(kind in _TABLE for kind in self.powers)


def in_common_units(found: str, gold: str) -> tuple[str, str] | None:
    """Both amounts in one unit, where both have one of the table; None where the units are different ones.

    As they are where one has no unit, or both the same. Units that are not in the table are the same if all words of one are in the other:
    ways, different ways.
    """
    (amount, unit), (gold_amount, gold_unit) = _split(found), _split(gold)
    if unit is None or gold_unit is None or unit == gold_unit:
        return found, gold
    if not unit.is_known and not gold_unit.is_known and (unit.powers <= gold_unit.powers or gold_unit.powers <= unit.powers):
        return found, gold
    if unit.powers != gold_unit.powers:
        return None
    ratio = unit.factor / gold_unit.factor
    return rf"\left({amount}\right)\cdot\frac{{{ratio.numerator}}}{{{ratio.denominator}}}", gold_amount


def _split(text: str) -> tuple[str, _Unit | None]:
    """An amount and its unit; None where it has none."""
    text = " ".join(text.split())
    match = _QUANTITY.fullmatch(text)
    unit = _unit(re.sub(r"\\[a-zA-Z]+|\\.", " ", match[2])) if match else None
    if match is None and (match := _PLAIN_QUANTITY.fullmatch(text)):
        unit = _unit(match[2])
        unit = unit if unit is not None and unit.is_known else None  # words that are no units may be variables
    return (text, None) if unit is None else (match[1], unit)


def _unit(text: str) -> _Unit | None:
    """Of `cm`, `cm^2`, `square feet`, `miles per hour`, `m/s^2`. What follows a slash is below it."""
    text = " ".join(re.sub(r"[{}.]", "", text).split())
    for pattern, by in _SPELLINGS:
        text = pattern.sub(by, text)
    factor, powers, sign = Fraction(1), Counter(), 1
    for slash, word, exponent in _FACTOR.findall(text):
        if slash:
            sign = -1
        else:
            kind, size = _named(word)
            power = sign * int(exponent or 1)
            factor, powers[kind] = factor * size**power, powers[kind] + power
    powers = Counter({kind: power for kind, power in powers.items() if power and kind not in _NO_UNIT})
    return _Unit(factor, powers) if powers else None


def _named(word: str) -> tuple[str, Fraction]:
    """The kind and the size of a unit of the table; any other word is its own kind."""
    name = word.lower() if len(word) > 2 else word
    for form in (name, name.lower(), name.removesuffix("s"), name.removesuffix("es")):
        if form in _UNITS:
            return _UNITS[form]
    return word.lower().removesuffix("s"), Fraction(1)
