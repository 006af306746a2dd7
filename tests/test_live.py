"""The live terminal view: what a canvas went through, and what the terminal shows of it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from shortrun import recipe, save_model

from unmask.policies.tokenizers import byte_tokenizer
from unmask.rl import show
from unmask.rl.live import Canvas, LiveView

MASK = 9


def test_a_canvas_knows_when_each_token_was_decided_and_what_was_taken_back() -> None:
    canvas = Canvas(tokens=[5, MASK, MASK], given={0})
    canvas.advance([5, 1, MASK], 0, MASK)
    assert (canvas.born, canvas.taken, canvas.retracted) == ([-1, 0, -1], set(), 0)
    canvas.advance([5, MASK, 2], 1, MASK)
    assert (canvas.born, canvas.taken, canvas.retracted) == ([-1, -1, 1], {1}, 1)
    canvas.advance([5, 3, 4, MASK], 2, MASK)  # one is replaced, one decided anew, the canvas grows
    assert (canvas.born, canvas.taken, canvas.retracted) == ([-1, 2, 2, -1], set(), 2)


@pytest.mark.parametrize("terminal", [True, False])
def test_what_the_terminal_shows(terminal: bool) -> None:
    tokenizer = byte_tokenizer()
    mask, file = tokenizer.mask_token_id, io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=80, color_system=None)
    given_BL = torch.tensor([[104, mask, mask], [mask, mask, mask]])
    with LiveView(tokenizer, mask, console, speed=1000.0, given_BL=given_BL) as view:
        view.draw(torch.tensor([[104, 105, mask], [mask, 111, 107]]))
        view.draw(torch.tensor([[104, 105, tokenizer.eos_token_id], [mask, mask, 107]]))
    text = file.getvalue()
    last = text[text.rindex("3/3") :]
    assert "hi∎" in last and "··k" in last and "1/3" in last
    assert "step 2  decided 4 of 6  taken back 1" in text
    assert ("hi·" in text) == terminal, "every step in a terminal, the last one elsewhere"


def test_a_group_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parent)
    recipe(save_model(tmp_path / "model"))
    changes = ["evaluation.temperature=1.0", "evaluation.problems=2"]
    one = show.sample("short.yaml", overrides=changes)
    several = show.sample("short.yaml", overrides=changes, live=True, group=3)
    printed = capsys.readouterr().out
    assert torch.equal(several.tokens_BL[0], one.tokens_BL[0]), "what is beside it changes no completion"
    assert len({tuple(row) for row in several.tokens_BL.tolist()}) == 3
    assert printed.count("(NFE)") == 4 and printed.count("outcome: ") == 4
