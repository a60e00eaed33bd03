"""Units of measure, for the one thing that math-verify cannot see: it drops them, so 5 m is 5 cm to it, and 500 cm is not 5 m."""

import re
from fractions import Fraction

_TABLE = {
    "length": "mm 1/1000, millimeter 1/1000, cm 1/100, centimeter 1/100, dm 1/10, m 1, meter 1, km 1000, kilometer 1000",
    "imperial length": "in 1, inch 1, ft 12, foot 12, feet 12, yd 36, yard 36, mi 63360, mile 63360",
    "time": "s 1, sec 1, second 1, min 60, minute 60, h 3600, hr 3600, hour 3600, day 86400, week 604800",
    "mass": "mg 1/1000, g 1, gram 1, kg 1000, kilogram 1000",
    "money": "cent 1/100, dollar 1",
}
_UNITS = {
    name: (kind, Fraction(factor)) for kind, entries in _TABLE.items() for name, factor in (entry.split() for entry in entries.split(", "))
}
_QUANTITY = re.compile(r"(.*[\d})])\s*(?:\\[, ])?\s*\\(?:text|mathrm|textrm|mbox)\s*\{\s*(?:\\[, ])?\s*([a-zA-Z]+)\.?\s*\}", re.DOTALL)


def in_common_units(found: str, gold: str) -> tuple[str, str] | None:
    """Both amounts in one unit, where both have one of the table; None where they are of different kinds.

    As they are where one has no unit, or none that is known: then it is a matter of wording.
    """
    (amount, unit), (gold_amount, gold_unit) = _split(found), _split(gold)
    if unit is None or gold_unit is None or unit == gold_unit:
        return found, gold
    if unit[0] != gold_unit[0]:
        return None
    ratio = unit[1] / gold_unit[1]
    return rf"\left({amount}\right)\cdot\frac{{{ratio.numerator}}}{{{ratio.denominator}}}", gold_amount


def _split(text: str) -> tuple[str, tuple[str, Fraction] | None]:
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        return text, None
    name = match[2].lower() if len(match[2]) > 2 else match[2]
    for form in (name, name.removesuffix("s"), name.removesuffix("es")):
        if form in _UNITS:
            return match[1], _UNITS[form]
    return text, None
