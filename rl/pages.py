"""Offline HTML pages: one file, no network, and nothing that a model wrote can run in it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def page(
    title: str,
    body: str,
    *,
    styles: Sequence[str],
    scripts: Sequence[str] = (),
    data: Mapping[str, Any] | None = None,
    refresh_s: int | None = None,
) -> str:
    """Return an HTML document that holds the style sheets and scripts of these names, `body` and `data`.

    `body` is markup: whoever passes text of a model or a recipe has escaped it. `data` are JSON values, each gzipped in
    an element of its own, so that a script inflates what it needs when it needs it. The page's content security policy
    lets nothing be fetched, and only the scripts of this package run. With `refresh_s` the page reloads itself.
    """
    code = [(FOLDER / name).read_text(encoding="utf-8") for name in scripts]
    allowed = " ".join(f"'sha256-{_digest(text)}'" for text in code) or "'none'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{html.escape(title)}</title>",
        *(f"<style>\n{(FOLDER / name).read_text(encoding='utf-8')}</style>" for name in styles),
    ]
    if refresh_s is not None:
        head.insert(2, f'<meta http-equiv="refresh" content="{refresh_s}">')
    stored = [f'<script type="text/plain" id="{name}">{packed(value)}</script>' for name, value in (data or {}).items()]
    running = [f"<script>{text}</script>" for text in code]
    parts = ["<!doctype html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", body, *stored, *running]
    return "\n".join([*parts, "</body>", "</html>", ""])


def packed(value: Any) -> str:
    """Return a JSON value, gzipped, in base64: letters that no markup can be made of."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("utf-8", "surrogatepass"), 6, mtime=0)).decode()


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()
