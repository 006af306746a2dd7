"""Hypothesis strategies for completions that a reward has to survive: what breaks parsers, clocks and memories."""

from __future__ import annotations

from hypothesis import strategies as st

MEGABYTE = 1 << 20
LATEX = (
    *(r"\frac", r"\dfrac", r"\sqrt", r"\boxed", r"\left(", r"\right)", r"\begin{pmatrix}", r"\end{pmatrix}", r"\lim"),
    *(r"\int_0^1", r"\sum_{n=1}^{N}", r"\binom", r"\text{", r"\infty", r"\cup", r"\{", r"\}", "\\\\", r"\%", r"\pi"),
    *(r"\log", r"\mathbb{R}", r"\prod", r"\cdot", r"\times", r"\pm", r"\le", r"\in", r"\overline", "99", " "),
    *"&^_{}()[]$!=<>|,;/*+-%xyei0129.",
)
MARKS = ("<answer>", "</answer>", "<reasoning>", "</reasoning>", "#### ", r"\boxed{", "```python\n", "```", "\n", "}")
PROGRAMS = (
    "while True: pass",
    "import os\nos.fork()",
    "x = '" + "a" * 60_000 + "'",
    "(" * 90 + ")" * 90,
    "def f(n): return f(n)",
    "print('x' * 10**9)",
    "bytearray(10**10)",
    "\x00",
    "def f(n):\n\treturn n\n  return",
    "raise SystemExit",
    "f = 5",
    "def f(n): return n",
    "import sys; sys.exit(0)",
    "lambda: (yield)",
    "class f: pass",
    "def f(*a): return 10**10**7",
)
FORMS = (r"\boxed{%s}", "#### %s", "<answer>%s</answer>", "```python\n%s\n```", "%s", r"<answer>\boxed{%s}</answer>")

latex = st.lists(st.sampled_from(LATEX), max_size=60).map("".join)
towers = st.tuples(
    st.sampled_from(["^", "**", "^{", "!^"]), st.lists(st.integers(2, 10**6), min_size=2, max_size=9)
).map(lambda pair: pair[0].join(map(str, pair[1])) + "}" * (len(pair[1]) - 1) * ("{" in pair[0]))
factorials = st.tuples(st.integers(0, 10**9), st.integers(1, 6)).map(lambda pair: f"({pair[0]}{'!' * pair[1]})!")
powers = st.tuples(latex, st.integers(1, 10**5)).map(lambda pair: f"({pair[0][:20]})^{{{pair[1]}}}")
integers = st.integers(1, 2 * 10**5).flatmap(lambda size: st.sampled_from("19").map(lambda digit: digit * size))
nests = st.tuples(st.sampled_from(["()", "[]", "{}", r"\{ \}", r"\frac{ }", r"\sqrt{ }"]), st.integers(1, 5000)).map(
    lambda pair: pair[0][: -1 if len(pair[0]) == 2 else -2] * pair[1] + "1" + pair[0][-1] * pair[1]
)
controls = st.text(st.characters(max_codepoint=0x9F, categories=("Cc",)), max_size=200)
unicode = st.text(max_size=200)
surrogates = st.text(st.characters(categories=("Cs", "Co", "Cf", "Mn", "Nd", "No", "Sm")), max_size=100)
expressions = st.text("0123456789+-*/() .", max_size=400)
grids = st.text("0123456789 \n", min_size=10, max_size=100)
megabytes = st.tuples(
    st.text(min_size=1, max_size=20) | st.sampled_from([*LATEX, *MARKS]), st.integers(10, MEGABYTE)
).map(lambda pair: (pair[0] * (pair[1] // len(pair[0]) + 1))[: pair[1]])
marked_spam = st.lists(st.sampled_from(MARKS), max_size=400).map("".join)
programs = st.sampled_from(PROGRAMS)
inner = st.one_of(
    latex, towers, factorials, powers, integers, nests, controls, unicode, surrogates, expressions, grids, programs
)
wrapped = st.tuples(inner, st.sampled_from(FORMS)).map(lambda pair: pair[1].replace("%s", pair[0]))
# Every form of completion; a megabyte and a program, which cost most, come up now and then.
completions = st.one_of(*[wrapped] * 12, marked_spam, megabytes)
