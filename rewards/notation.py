"""One notation for the many ways of writing an answer, before anything is parsed; version 1 of the reading."""

from __future__ import annotations

import re
import unicodedata

from .extraction import extract_answer

MAX_CHARACTERS = 512
MAX_DEPTH = 32
MAX_DIGITS = 200
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPT = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SYMBOLS = {
    "−": "-",
    "–": "-",
    "—": "-",
    "﹣": "-",
    "×": r"\times ",
    "⋅": r"\cdot ",
    "·": r"\cdot ",
    "÷": r"\div ",
    "⁄": "/",
    "∕": "/",
    "±": r"\pm ",
    "π": r"\pi ",
    "θ": r"\theta ",
    "∞": r"\infty ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∅": r"\emptyset ",
    "∈": r"\in ",
    "°": r"^\circ ",
    "′": "'",
    "“": '"',
    "”": '"',
    "（": "(",
    "）": ")",
    "，": ",",
}
_VULGAR = re.compile(r"(\d?)\s*([¼½¾⅐-⅞])")
_DELIMITERS = [(r"\(", r"\)"), (r"\[", r"\]"), ("$$", "$$"), ("$", "$"), ("**", "**"), ("`", "`")]
_CURRENCY = re.compile(r"\\\$|[$€£¥₹]|\\text\{\s*(?:dollars?|cents?|USD|EUR)\s*\}|\b(?:USD|EUR|GBP)\b")
_GROUPED = re.compile(r"([+-]?)(\d{1,3}(?:(?:,|\{,\}|\\,|\\!|,\\!|_|[  ])\d{3})+)(\.\d+)?")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})(?!\w)")
_MIXED = re.compile(r"([+-]?)\s*(\d+)\s+(\d+)\s*/\s*(\d+)")
_ROOT = re.compile(r"√\s*(\([^()]*\)|\{[^{}]*\}|\d+|[a-zA-Z])")
_WORD = re.compile(r"(?<![\\a-zA-Z{])(?<!\\text\{)([a-zA-Z]{3,}(?:[ -][a-zA-Z]{2,})*)(?![a-zA-Z{(}])")
_FUNCTIONS = frozenset(
    (
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "exp",
        "sqrt",
        "arcsin",
        "arccos",
        "arctan",
        "min",
        "max",
        "gcd",
        "lcm",
    )
)
_INTRODUCTION = re.compile(
    r"(?:\\text\{\s*)?(?:(?:therefore|thus|so|hence)[, ]+)?(?:the\s+)?(?:final\s+)?answer(?:\s+is|\s*:)\s*:?\s*\}?",
    re.IGNORECASE,
)
_MEMBER = re.compile(r"[a-zA-Z]\s*\\in\b\s*")
_AND = re.compile(r"\\text\{\s*,?\s*(?:and|or)\s*\}|\s,?\s*(?:and|or)\s")
_UNIT = re.compile(r"(?<=\d)\s*\b(?:mm|cm|km|ft|in|yd|mi|kg|mg|lb|oz|ml|mph|kph|hr|sec|min)(?:\s*\^\s*\{?[23]\}?)?$")
# Numbers beyond what any problem asks for; evaluating them would cost the time limit, which is no verdict.
_TOWER = re.compile(
    r"\^\s*\{?\s*\(?\s*\d+\s*(?:\^|\*\*)\s*\{?\s*\(?\s*\d+\s*(?:\^|\*\*)|(?:\d\s*(?:\^|\*\*)\s*[{(\s]*){3}"
)
_HUGE = re.compile(
    r"(?:\^|\*\*)[\s{(]*\d[\d,]{4,}|\d[\d,]{4,}[\s})]*!|(?:\^|\*\*)[\s{(]*\d+[\s{(]*(?:\^|\*\*)[\s{(]*\d{2,}|!\s*!\s*!"
)


def too_large(answer: str) -> bool:
    """Tell whether an answer is longer, deeper nested or larger than any answer to a problem.

    More than MAX_CHARACTERS characters, MAX_DEPTH open brackets, MAX_DIGITS digits in a row, a numeric exponent or
    factorial of five digits, or a tower of three powers.
    """
    if len(answer) > MAX_CHARACTERS:
        return True
    depth = deepest = 0
    for character in answer:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    digits = re.search(rf"\d{{{MAX_DIGITS + 1}}}", answer)
    return deepest > MAX_DEPTH or digits is not None or bool(_TOWER.search(answer) or _HUGE.search(answer))


def normalise(answer: str) -> str:
    r"""Return an answer in the notation that is parsed: LaTeX without delimiters, currency, grouping commas or Unicode.

    Opens a `\boxed{...}`; writes Unicode signs, fractions, exponents and roots as LaTeX, `2 1/2` and `2½` as a mixed
    number, `1e3` as a power of ten, words as `\text{...}`.
    """
    text = _plain_text(answer)
    text = extract_answer(text, "boxed") or text
    text = _INTRODUCTION.sub("", text, count=1) if _INTRODUCTION.match(text) else text
    text = _stripped(text)
    text = _MEMBER.sub("", text, count=1) if _MEMBER.match(text) else text
    text = _UNIT.sub("", _AND.sub(", ", _CURRENCY.sub("", text)).strip())
    text = text.removesuffix(r"\%").strip() + r"\%" if text.endswith(r"\%") else text
    grouped = _GROUPED.fullmatch(text.removesuffix(r"\%").removesuffix("%"))
    if grouped is not None:
        text = grouped[1] + re.sub(r"\D", "", grouped[2]) + (grouped[3] or "") + text[grouped.end() :]
    mixed = _MIXED.fullmatch(text)
    if mixed is not None:
        text = f"{mixed[1]}{mixed[2]}\\frac{{{mixed[3]}}}{{{mixed[4]}}}"
    if re.fullmatch(r"[a-zA-Z][a-zA-Z' -]*", text) and re.search("[a-zA-Z]{3}", text):
        return rf"\text{{{text}}}"
    text = _SCIENTIFIC.sub(r"\1\\times10^{\2}", text)
    return _WORD.sub(_as_text, text).strip()


def _plain_text(answer: str) -> str:
    """Return the answer in ASCII and LaTeX as far as Unicode's signs have a meaning in mathematics."""
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda found: "^{" + found[0].translate(_SUPERSCRIPT) + "}", answer)
    text = re.sub(r"[₀-₉]+", lambda found: "_{" + found[0].translate(_SUBSCRIPT) + "}", text)
    text = _VULGAR.sub(_fraction, text)
    text = "".join(_SYMBOLS.get(character, character) for character in text)
    text = unicodedata.normalize("NFKC", text)
    text = "".join(_SYMBOLS.get(character, character) for character in text)
    text = "".join(str(unicodedata.decimal(c)) if unicodedata.category(c) == "Nd" else c for c in text)
    text = _ROOT.sub(lambda found: r"\sqrt{" + found[1].strip("(){}") + "}", text)
    kept = (c for c in text if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn") or c in "\n\t")
    text = re.sub(r"\{\{([^{}]*)\}\}", r"{\1}", "".join(kept))
    return re.sub(r"\s+", " ", text).strip()


def _fraction(found: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", found[2]).partition("⁄")
    return rf"{found[1]}\frac{{{top}}}{{{bottom}}}"


def _stripped(text: str) -> str:
    """Return the text without a final full stop, and without the delimiters around all of it."""
    before = None
    while text != before:
        before, text = text, text.strip().removesuffix(".").removesuffix(r"\ ").strip()
        for opening, closing in _DELIMITERS:
            inner = text[len(opening) : -len(closing)]
            if text.startswith(opening) and text.endswith(closing) and inner and opening not in inner:
                text = inner
    return text


def _as_text(found: re.Match[str]) -> str:
    word = found[1]
    return word if word.split()[0].lower() in _FUNCTIONS else rf"\text{{{word}}}"
