"""The page of `unmask view`, in a real browser: what it shows, that it plays, and that a completion cannot act."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import NARROW, WIDE, compare, opened, until
from syntheticrun import HOSTILE, TOKENIZER, trajectory, write_run

from unmask.recipes.registry import RecipeError
from unmask.rl.cli import main
from unmask.rl.runfolder import RunError
from unmask.rl.viewing import Source, render, stored_rollouts, view, view_heldout
from unmask.rollouts.trajectory import EDITED, GIVEN

CANVAS = 110


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with hints, retractions, growing canvases, and a prompt and completion that are markup."""
    folder = tmp_path_factory.mktemp("runs") / "hard"
    return write_run(folder, steps=30, every=10, canvas=CANVAS, hostile=True, hard=True)


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    return view([run])


def stored(file: Path, name: str) -> Any:
    """Return a JSON value that a page holds."""
    (text,) = re.findall(rf'id="{name}">([^<]*)<', file.read_text())
    return json.loads(gzip.decompress(base64.b64decode(text)))


def texts(tab: Any, selector: str) -> list[str]:
    return tab.eval_on_selector_all(selector, "nodes => nodes.map(node => node.textContent)")


def test_every_rollout_is_on_the_page_and_nothing_else_is_markup(run: Path, page: Path) -> None:
    index, rows = stored(page, "index"), stored_rollouts(run, 10_000)[0]
    assert index["reward"] == [row["reward"] for row in rows]
    assert [index["outcomes"][code] for code in index["outcome"]] == [row["outcome"] for row in rows]
    parts = [stored(page, f"part-{number}") for number in range(len(index["starts"]))]
    assert [r["completion"] for part in parts for r in part["rows"]] == [row["completion"] for row in rows]
    assert HOSTILE in parts[0]["prompts"].values()
    assert "owned" not in page.read_text(), "text of a model is never markup, not even inside a script"
    assert not re.findall(r"(?:src|href)=|url\(|@import|https?://", page.read_text())


def test_frames_are_the_canvases_that_the_denoiser_saw(run: Path, page: Path) -> None:
    made = trajectory([row["completion"] for row in stored_rollouts(run, 10_000)[0][:8]], CANVAS, "0/0", hard=True)
    assert made.retracted is not None and set(made.source_BL.unique().tolist()) >= {GIVEN, EDITED}
    pieces = stored(page, "index")["pieces"]
    with opened(page) as tab:
        for row in range(4):
            for step in range(int(made.steps_B[row]) + 1):
                at = torch.tensor([row]), torch.tensor([step])
                exists = made.exists_before(*at)
                assert exists is not None
                expected = [
                    (pieces.index(_piece(token)) if token != made.mask_token_id else -1)
                    for token, here in zip(made.canvas_before(*at)[0].tolist(), exists[0].tolist(), strict=True)
                    if here
                ]
                cells = tab.evaluate(f"canvasAt(shown.cards[{row}].row, {step})")
                seen = [
                    -1 if cell["state"] in ("masked", "taken") else cell["token"]
                    for cell in cells
                    if cell["state"] != "absent"
                ]
                assert seen == expected, (row, step)


def _piece(token: int) -> str:
    return TOKENIZER.decode([token])


def test_it_plays_scrubs_and_colours(page: Path) -> None:
    with opened(page) as tab:
        steps = int(tab.input_value("#step"))
        assert steps == tab.evaluate("shown.steps") and tab.locator(".card").count() == 4
        final = texts(tab, ".card:nth-child(2) .canvas span")
        tab.keyboard.press("Home")
        assert tab.input_value("#step") == "0"
        kinds = tab.evaluate("shown.cards[1].spans.map(span => span.className.trim().split(' ')[0])")
        assert kinds[0] == "given" and set(kinds[1:]) == {"mask", "absent"}
        for _ in range(3):
            tab.keyboard.press("ArrowRight")
        assert tab.text_content("#at") == f"3 / {steps}"
        assert tab.locator(".card:nth-child(2) .fresh").count() > 0
        tab.select_option("#speed", "30")
        tab.locator("h1").click()
        tab.keyboard.press("Space")
        assert tab.text_content("#play") == "pause"
        until(tab, "at('step').value", str(steps))
        until(tab, "at('play').textContent", "play")
        assert texts(tab, ".card:nth-child(2) .canvas span") == final
        shades = {}
        for colour in ("confidence", "advantage", "step"):
            tab.keyboard.press("c")
            assert tab.input_value("#colour") == colour
            shades[colour] = tab.evaluate(
                "shown.cards[1].spans.map(span => (span.className.match(/[dq]\\d$/) || [''])[0])"
            )
        assert {shade[:1] for shade in shades["advantage"]} <= {"", "d"}
        assert shades["step"] != shades["confidence"]
        sure = tab.evaluate("shown.cards[1].cells.map(cell => cell.logprob)")
        for tint, logprob in zip(shades["confidence"], sure, strict=True):
            assert tint == ("" if logprob is None else f"q{min(8, int(9 * math.exp(logprob)))}")


def test_hints_and_retractions_are_marked(page: Path) -> None:
    with opened(page) as tab:
        seen = set()
        for step in range(int(tab.input_value("#step")) + 1):
            tab.evaluate(f"scrub({step})")
            seen |= set(tab.evaluate("shown.cards.flatMap(card => card.cells.map(cell => cell.state))"))
        assert seen == {"masked", "sampled", "given", "edited", "doomed", "taken", "absent"}


def test_filters_and_search(run: Path, page: Path) -> None:
    rows = stored_rollouts(run, 10_000)[0]
    with opened(page) as tab:

        def count(matching: list[dict[str, Any]]) -> None:
            groups = len({(row["step"], row["group"]) for row in matching})
            until(tab, "at('count').textContent", f"{len(matching)} rollouts in {groups} groups")

        count(rows)
        for box in tab.locator("#outcomes input").all()[1:]:
            box.uncheck()
        count([row for row in rows if row["outcome"] == "ok"])
        tab.click("#reset")
        tab.fill("#least", "0.05")
        tab.fill("#most", "1.05")
        count([row for row in rows if 0.05 <= row["reward"] <= 1.05])
        tab.click("#reset")
        tab.fill("#from", "15")
        count([row for row in rows if row["step"] >= 15])
        tab.click("#reset")
        word = rows[9]["completion"].splitlines()[0]
        tab.fill("#search", word.upper())
        count([row for row in rows if word.lower() in (row["prompt"] + row["completion"]).lower()])
        tab.fill("#search", "nothing holds this")
        count([])
        tab.click("#reset")
        count(rows)
        tab.locator("h1").click()
        tab.keyboard.press("j")
        until(tab, "at('where').textContent", "step 10, group 1")
        tab.keyboard.press("/")
        assert tab.evaluate("document.activeElement.id") == "search"


def test_a_completion_that_is_markup_does_nothing(page: Path) -> None:
    with opened(page) as tab:
        assert tab.title() == "hard: rollouts"
        assert tab.text_content("#prompt") == HOSTILE
        assert "".join(texts(tab, ".card:nth-child(1) .canvas span")).startswith("<script>")
        assert tab.locator(".card script, .card img, #prompt img").count() == 0


class Vocabulary:
    """A tokenizer one of whose tokens is markup by itself."""

    all_special_ids = ()

    def decode(self, ids: list[int]) -> str:
        return HOSTILE


def test_a_token_a_name_and_a_judgement_that_are_markup_do_nothing(run: Path, tmp_path: Path) -> None:
    rows = [row | {"extra/extracted": HOSTILE, f"reward/{HOSTILE}": 1.0} for row in stored_rollouts(run, 10_000)[0][:8]]
    (tmp_path / "view.html").write_text(render([Source(HOSTILE, rows, Vocabulary())], title=HOSTILE, note=HOSTILE))
    with opened(tmp_path / "view.html") as tab:
        tab.evaluate("scrub(30)")
        tab.hover(".card .canvas span")
        assert tab.title() == f"{HOSTILE}: rollouts" and tab.text_content("h1") == HOSTILE
        assert HOSTILE in texts(tab, ".card .canvas span")
        assert tab.locator("header script, header img, main script, main img").count() == 0


def test_two_runs_are_beside_each_other_on_the_same_prompt(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, steps=4, every=2, seed=0) for name in ("one", "two")]
    with opened(view(runs, tmp_path / "both.html")) as tab:
        assert texts(tab, "#groups h2") == ["one, step 0, group 0", "two, step 0, group 0"]
        assert tab.locator(".card").count() == 8
        tab.select_option("#beside", "")
        until(tab, "document.querySelectorAll('.card').length", 4)


def test_many_groups_are_paged(tmp_path: Path) -> None:
    run = write_run(tmp_path / "many", steps=4, every=2, prompts=150, group=2, canvas=12)
    page = view([run])
    assert len(stored(page, "index")["starts"]) == 3
    with opened(page) as tab:
        assert tab.locator("#list li").count() == 100
        tab.click("#later")
        assert texts(tab, "#list li:first-child button span")[-1] == "" and tab.text_content("#page") == "page 2 of 3"
        tab.click("#list li:last-child button")
        until(tab, "at('where').textContent", "step 2, group 49")


def test_a_limit_takes_evenly_spaced_batches(tmp_path: Path) -> None:
    run = write_run(tmp_path / "long", steps=9, every=1, canvas=12)
    assert {row["step"] for row in stored_rollouts(run, 3 * 8)[0]} == {0, 4, 8}
    assert len(stored_rollouts(run, 1)[0]) == 8


def test_without_a_tokenizer_tokens_are_numbers(run: Path, tmp_path: Path) -> None:
    recipe = run / "recipe.yaml"
    text = recipe.read_text()
    try:
        recipe.write_text(text.replace("unmask:tiny", "/nowhere/model"))
        pieces = stored(view([run], tmp_path / "numbers.html"), "index")["pieces"]
    finally:
        recipe.write_text(text)
    assert all(re.fullmatch(r"⟨\d+⟩", piece) for piece in pieces)


def test_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for words, told in (
        (["view", str(tmp_path / "none")], "is no run's folder"),
        (["view", str(tmp_path)], "holds no rollouts"),
        (["view", str(tmp_path), "a=1"], "--heldout"),
        (["report", str(tmp_path / "none")], "is no run's folder"),
    ):
        monkeypatch.setattr("sys.argv", ["unmask", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2 and told in capsys.readouterr().err
    assert issubclass(RunError, ValueError) and issubclass(RecipeError, ValueError)


def test_heldout_problems_of_two_policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shortrun import recipe, save_model

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parent)
    assert recipe(save_model(tmp_path / "model")).rollout.group == 4
    (tmp_path / "later.yaml").write_text((tmp_path / "short.yaml").read_text())
    for temperature, group in ((1.0, 4), (0.0, 1)):
        shapes = [f"evaluation.temperature={temperature}"]
        out = view_heldout(["short.yaml", "later.yaml"], tmp_path / "view.html", problems=2, overrides=shapes)
        index = stored(out, "index")
        assert index["runs"] == ["short.yaml", "later.yaml"]
        assert index["prompt"] == ([0] * group + [1] * group) * 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", ["wide", "narrow"])
def test_it_looks_as_it_did(page: Path, width: str, scheme: str) -> None:
    with opened(page, size=WIDE if width == "wide" else NARROW, scheme=scheme) as tab:
        tab.evaluate("scrub(30)")
        assert tab.evaluate("document.documentElement.scrollWidth") <= tab.viewport_size["width"], "nothing is cut off"
        taken = tab.screenshot()
    compare(taken, f"viewer-{width}-{scheme}.png")
