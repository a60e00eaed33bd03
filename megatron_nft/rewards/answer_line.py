r"""DAPO's own verdict: the last "Answer:" line and the gold, both normalised, are the same text.

The rule is the one published with DAPO (arXiv 2503.14476), its odd corners included, so that scores can be compared: units and
words go wherever they stand, even within another word; a list of whole numbers closes up to one, 1, 2 to 12; and nothing is computed:
0.5 is not \frac{1}{2}, 025 is not 25.
"""

import re
from functools import lru_cache

from megatron_nft.rewards.boxed import NO_ANSWER, verdict
from megatron_nft.trajectories import Verdict

WINDOW = 300  # characters at the end of the response
_LINE = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
_ARTICLES = ("an ", "a ")
_TEX_SPACES = (r"\$", r"\ ", " ")
_UNITS = (
    "square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", r"\ldots", "sue", "points", "feet", "minutes",
    "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students", "childrentickets", "multiples",
)  # fmt: skip
_EMPTIED = (r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3", "\\text{\n}", r"\text{}")
_MARKS = (r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots")
_WRAPPERS = [(re.compile(rf"\\{name}\{{(.*?)\}}"), r"\1") for name in ("text", "textbf", "overline")]
# the shorthand of TeX: \frac12, \sqrt3
_SHORTHAND = [(re.compile(r"frac([^{])(.)"), r"frac{\1}{\2}"), (re.compile(r"sqrt([^{])"), r"sqrt{\1}")]
_REWRITTEN = [
    (re.compile(r".*?\$(.*?)\$.*"), r"$\1$"),  # of text around mathematics the mathematics
    *_WRAPPERS,
    (re.compile(r"\\boxed\{(.*)\}"), r"\1"),
    *_SHORTHAND,
]


def dapo(response: str, answer: str) -> Verdict:
    """The last "Answer: ..." within the last 300 characters is the gold; without such a line there is no answer."""
    lines = _LINE.findall(response[-WINDOW:])
    if not lines:
        return NO_ANSWER
    found = normalise(lines[-1])
    return verdict(found == _normalised_gold(answer), found)


def normalise(text: str) -> str:
    """An answer in the form in which DAPO compares it: what follows the last "=", without units, words, TeX's wrapping and commas."""
    text = text.rsplit("=", 1)[-1]
    text = _without(text, _ARTICLES).replace(".$", "$")
    text = _without(text, _TEX_SPACES).replace("mbox", "text")
    text = text.replace(r",\text{and}", ",").replace(r"\text{and}", ",").replace(r"\text{m}", r"\text{}")
    text = _without(text, (*_UNITS, *_EMPTIED, *_MARKS))
    for pattern, by in _REWRITTEN:
        text = pattern.sub(by, text)
    text = text.replace("$", "")
    digits = text.replace(",", "")
    return (digits if digits.isdigit() else text).strip()


_normalised_gold = lru_cache(4096)(normalise)  # K answers of a group have the same one


def _without(text: str, parts: tuple[str, ...]) -> str:
    """One after the other, because the published rule does so: what closes up may be a part in its turn."""
    for part in parts:
        text = text.replace(part, "")
    return text
