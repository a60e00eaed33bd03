r"""Spellings that math-verify does not read, or misreads, rewritten as plain LaTeX. Nothing here changes what an answer is worth.

The patterns run on what a model wrote: none may look at a run of characters again from each place in it (two `\s*` side by side, or one
beside a class that holds spaces), and digits that become an integer are bounded, because int() refuses more than 4300.
"""

import re
import string
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

_SYMBOLS = str.maketrans({
    **dict.fromkeys("−–—﹣－", "-"), **dict.fromkeys("·⋅•∙", r"\cdot "), **dict.fromkeys("°º˚", r"^{\circ}"), **dict.fromkeys("、，", ","),
    "×": r"\times ", "÷": r"\div ", "√": r"\sqrt ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "٫": ".", "٬": ",", "。": ".",
})  # fmt: skip
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+"))
_SUPERSCRIPT = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")

_WORD = r"(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox)"
_WRAPPED = re.compile(rf"\\{_WORD}\s*\{{([^{{}}]*)\}}")
_SPACE = re.compile(r"(?<![0-9]) | (?![0-9])")  # between two digits it means something
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
_INTEGER = r"(\d{1,300})"
_AROUND = string.whitespace + "~"

Replacement = str | Callable[[re.Match[str]], str]


def _repeating(match: re.Match[str]) -> str:
    r"""0.1\overline{6} as a fraction."""
    whole, fixed, period = match[1] or "0", match[2], match[3]
    value = Fraction(int(whole + fixed + period) - int(whole + fixed), 10 ** len(fixed) * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _mixed_percent(match: re.Match[str]) -> str:
    sign, whole, top, bottom = match.groups()
    return rf"{sign}\frac{{{int(whole) * int(bottom) + int(top)}}}{{{bottom}}}\%"


def _fraction(match: re.Match[str]) -> str:
    r"""\frac12 in full."""
    return rf"\{match[1]}{{{match[2] or match[3]}}}{{{match[4] or match[5]}}}"


_RULES: list[tuple[re.Pattern[str], Replacement]] = [
    # marks around the answer
    (re.compile(r"^(?:\*\*|`)(.+?)(?:\*\*|`)$"), r"\1"),
    (re.compile(r"^(?:\\[(\[])(.+?)(?:\\[)\]])$", re.DOTALL), r"\1"),
    (re.compile(r"\\(?:phantom|hspace\*?|label)\s*\{[^{}]*\}"), ""),
    (re.compile(r"\\(?:textcolor|color)\s*\{[^{}]*\}\s*"), ""),
    (re.compile(r"\\(?:underline|fbox|mathbf|bm|boldsymbol)\s*\{([^{}]*)\}"), r"{\1}"),
    (re.compile(rf"\\{_WORD}\s*\{{({_NUMBER})(\s[^{{}}]*)?\}}"), lambda m: m[1] + (rf"\text{{{m[2]}}}" if m[2] else "")),
    (re.compile(r"\^\s*\{?\\(?:text|mathrm)\{(?:st|nd|rd|th)\}\}?"), ""),
    # of "5 or 6" in a \text{} the numbers are mathematics
    (re.compile(rf"\\{_WORD}\s*\{{\s*(?:({_NUMBER})\s+)?(or|and)\s+({_NUMBER})\s*\}}"), r"\1\\text{ \2 }\3"),
    (re.compile(r"(?<=[\d})])\s*(?![\u4e00-\u9fff]*[不非无無没沒否错錯或和与與若如])[\u4e00-\u9fff]+$"), ""),  # a unit in Chinese
    (re.compile(r"(?<=[\w})\]])[.,;]$"), ""),
    (re.compile(r"^\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}$"), r"\1"),
    # numbers
    (re.compile(r"(?<=\d)(?:\\[,;! ]|~|\{,\}|,\\!)(?=\d{3}(?!\d))"), ""),
    (re.compile(r"^(-?\d{1,3})((?: \d{3})+)$"), lambda m: m[1] + m[2].replace(" ", "")),
    (re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\w.])"), r"\1 \\times 10^{\2}"),
    (re.compile(r"(?<![\w.])(\d{0,300})\.(\d{0,300})\\overline\s*\{(\d{1,300})\}"), _repeating),
    (re.compile(r"(?<![\w./])(\d+) +(\d+)/(\d+)(?![\w.])"), r"\1\\frac{\2}{\3}"),
    (re.compile(rf"\\([dtc]?frac) ?(?:\{{{_INTEGER}\}}|(\d)) ?(?:\{{{_INTEGER}\}}|(\d))"), _fraction),
    (re.compile(rf"^(-?){_INTEGER}\s*\\[dt]?frac\{{{_INTEGER}\}}\{{{_INTEGER}\}}\s*\\?%$"), _mixed_percent),
    (re.compile(r"\\(sin|cos|tan|cot|sec|csc)\s*(?:[({]\s*)?(\d+(?:\.\d+)?)\s*\^\s*\{?\\circ\}?\s*[)}]?"), r"\\\1(\\frac{\2\\pi}{180})"),
    # commands
    (re.compile(r"(?<![\\a-zA-Z])([dt]?frac|sqrt)(?=\{)"), r"\\\1"),
    (re.compile(r"\\sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\\varnothing(?![a-zA-Z])"), r"\\emptyset"),
    (re.compile(r"\\lbrace(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\\(?:left)?\\?langle(?![a-zA-Z])"), "("),
    (re.compile(r"\\(?:right)?\\?rangle(?![a-zA-Z])"), ")"),
    (re.compile(rf"^(?:\\{_WORD}\s*\{{)?\s*no (?:real )?solutions?\s*\}}?$", re.IGNORECASE), r"\\emptyset"),
]


@lru_cache(4096)
def tidy(text: str) -> str:
    """The answer in the spelling that math-verify reads; most answers are in it already and come back as they are."""
    text = _bare(text if text.isascii() else _to_ascii(text))
    for pattern, by in _RULES:
        text = _bare(pattern.sub(by, text))
    return _interval(text)


def _bare(text: str) -> str:
    return text.strip(_AROUND).lstrip("=" + _AROUND)


def _interval(text: str) -> str:
    """An interval as it is written in France: ]2,5[ is open."""
    inner = text[1:-1]
    if text[:1] + text[-1:] not in ("][", "]]", "[[") or inner.count(",") != 1 or "[" in inner or "]" in inner:
        return text
    return ("(" if text[0] == "]" else "[") + inner.strip() + (")" if text[-1] == "[" else "]")


def words(text: str) -> str:
    r"""The text without \text{} and spaces, for answers that are words; in lower case where it has more than one letter."""
    bare = without_spaces(_WRAPPED.sub(r"\1", text))
    return bare.lower() if len(bare) > 1 and bare.isalpha() else bare


def without_spaces(text: str) -> str:
    """1 2 stays what it is."""
    return _SPACE.sub("", " ".join(text.split()))


def _to_ascii(text: str) -> str:
    """Digits of any script, full-width forms, signs and invisible characters; letters stay."""
    text = _SUPERSCRIPT.sub(lambda run: f"^{{{''.join(_SUPERSCRIPTS[mark] for mark in run[0])}}}", text)
    return "".join(map(_plain, text.translate(_SYMBOLS)))


def _plain(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cf":  # zero width, direction of writing
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category == "Nl" and unicodedata.numeric(character, 0.5).is_integer():  # Roman numerals
        return str(int(unicodedata.numeric(character)))
    plain = unicodedata.normalize("NFKC", character)
    top, slash, bottom = plain.partition("\N{FRACTION SLASH}")
    return rf"\frac{{{top}}}{{{bottom}}}" if slash else plain
