r"""Answers that say more than a value: 5\text{ or 6}, 5\text{ is wrong}, > 5. math-verify passes over the words and reads 5."""

import re

_TEXT = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}"
_WORDS = (
    "not", "isn't", "is", "are", "if", "unless", "otherwise", "but", "except", "wrong", "false", "incorrect", "never", "than", "least",
    "most", "hundred", "thousand", "million", "billion", "trillion", "dozen",
)  # fmt: skip
_NO_VALUE = re.compile(rf"(?<![a-zA-Z\\])(?:{'|'.join(_WORDS)})(?![a-zA-Z])|[不非无無没沒否错錯若如百千万萬亿億]", re.IGNORECASE)
_JOINED = re.compile(r"(?<![a-zA-Z\\])(?:or|and)(?![a-zA-Z])|\\(?:lor|vee|land|wedge)(?![a-zA-Z])|[或和与與;]", re.IGNORECASE)
_RELATION = re.compile(r"\\(?:neq?|neg|lnot|not|[lg]t|[lg]eq?|[lg]eqslant)(?![a-zA-Z])|[<>]")
_RELATION_WITH_EQUALS = re.compile(r"(?:\\not\s?|[<>!/])=")
_SEVERAL = re.compile(r"[,;]|\\(?:\{|cup|in|mathbb|emptyset|infty|pm|mp|begin)(?![a-zA-Z])")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+")
_PLACE = re.compile(r"[\w^_+-]")  # before a digit that belongs to a unit or a formula: m^2, m^-1, H_2O


def says_another(found: str, gold: str) -> bool:
    """Whether an answer that is not the gold's text says something else than the one value that the gold is.

    Both as tidy leaves them. A gold that speaks the same way is left to the library: x<5 may be what was asked for, and so may 5 or 6.
    """
    if _has_words(gold) or _RELATION.search(gold):
        return False
    return _has_words(found) or (_is_one(gold) and bool(_JOINED.search(found) or _RELATION.search(_last_side(found))))


def _has_words(text: str) -> bool:
    return bool(_NO_VALUE.search(text)) or any(_has_more(match, text) for match in re.finditer(_TEXT, text))


def _has_more(match: re.Match[str], text: str) -> bool:
    r"""A \text{} with a comma, or one behind the answer with a number."""
    inner = match[1]
    digits = (place for place, mark in enumerate(inner) if mark.isdigit() and not (place and _PLACE.match(inner[place - 1])))
    return "," in inner or (text[: match.start()].strip() != "" and next(digits, None) is not None)


def _is_one(gold: str) -> bool:
    """Neither a set nor a list nor an interval."""
    return bool(_THOUSANDS.fullmatch(gold)) or not (_SEVERAL.search(gold) or _JOINED.search(gold))


def _last_side(text: str) -> str:
    """What follows the last sign of equality: of P(X>3) = 0.5 the 0.5."""
    return _RELATION_WITH_EQUALS.sub(r"\\ne ", " ".join(text.split())).rsplit("=", 1)[-1]
