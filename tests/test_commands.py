"""Every command block of README, CONTRIBUTING and docs is run, in its order, on a random model of tiny size."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from shortrun import save_model
from syntheticrun import write_run

from unmask.rl import cli

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Its commands use each other's folders: tests/test_docs_evaluating.py runs them as they stand.
DOCUMENTS.remove(ROOT / "docs" / "evaluating.md")
# Commands that are run elsewhere; everything else in a block must start with `unmask` and is run here.
ELSEWHERE = {
    "make": "CI runs every target named here",
    ".ci/run": "it runs this test",
    "pip": "CI installs the wheel; an extra is a line of pyproject.toml",
    "pytest tests/conformance": "runs with the suite",
    "unmask convert": "tests/test_convert_export.py runs it on a folder and a GGUF file",
    "unmask sft smollm2.yaml": "needs that download; tests/test_convert_export.py trains a converted model",
    "unmask export": "tests/test_convert_export.py compares its logits",
    "unmask bench": "tests/test_bench_rollout.py",
}
RL = [
    "optim.steps=2",
    "optim.warmup=0",
    "rollout.prompts=2",
    "rollout.group=2",
    "evaluation.problems=2",
    "run.save_every=1",
]
RL += ["objective.inner_steps=1", "evaluation.every=0", "run.log_rollouts_every=1", "model.sharding=none"]
SFT = ["optim.steps=2", "optim.warmup=0", "sft.batch=2", "evaluation.problems=1", "run.save_every=0"]
CPU = ["model.device=cpu", "model.dtype=float32", "rollout.canvas=64"]


def commands(path: Path) -> list[str]:
    """Return the command lines of a document's bash blocks, without comments, continued lines joined."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            found += [part.strip() for part in re.sub(r"(^|\s)#.*", "", line).split("&&") if part.strip()]
    return found


def runnable(path: Path) -> list[str]:
    return [line for line in commands(path) if not line.startswith(tuple(ELSEWHERE))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_command_is_one_that_is_run(path: Path) -> None:
    for line in runnable(path):
        assert line.startswith("unmask ") or "python -m zipfile" in line or "python benchmarks" in line, line


def test_every_reason_is_used() -> None:
    lines = [line for path in DOCUMENTS for line in commands(path)]
    unused = [start for start in ELSEWHERE if not any(line.startswith(start) for line in lines)]
    assert not unused


def tiny(line: str, model: Path) -> list[str]:
    """Return the words of a command, its work made small; what it says of itself still wins over what is made small."""
    words = [str(model) if word in ("DIR", "unmask:tiny") else word for word in shlex.split(line)[1:]]
    if "--nproc" in words:  # tests/test_ranks.py starts several processes
        place = words.index("--nproc")
        del words[place : place + 2]
    if "--problems" in words:
        words[words.index("--problems") + 1] = "2"
    hub = any(word.startswith("llada8b") for word in words)
    words = [word for word in words if not word.startswith("model.path=/models")]
    if words[0] == "train" and "--resume" not in words:
        saved = [f"optim.steps={word.partition('=')[2]}" for word in words if word.startswith("run.save_every=")]
        words = [word for word in words if not word.startswith("rollout.prompts=")]
        return [*words[:2], *RL, *saved[:1], f"model.path={model}", *(CPU if hub else []), *words[2:]]
    if words[0] == "sft":
        return [*words[:2], *SFT, *words[2:]]
    if words[0] in ("data", "reward"):
        return [*words[:3], *([f"model.path={model}", *CPU] if hub else []), *words[3:]]
    if words[:2] == ["evaluate", str(model)] or words[:2] == ["sample", str(model)]:
        return [*words, "rollout.canvas=16"]
    return words


def furnish(path: Path) -> None:
    """Put into the current folder what a document's commands read: its recipes, modules and data."""
    Path("recipes").symlink_to(ROOT / "recipes")
    Path("data").mkdir()
    rows = [{"prompt": f"{a}+{b}", "answer": str(a + b)} for a in range(8) for b in range(4)]
    for name, part in {"train": rows[:24], "heldout": rows[24:]}.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        for file in (f"data/{name}.jsonl", f"data/gsm8k_{name.replace('heldout', 'test')}.jsonl"):
            Path(file).write_text(text)
    recipe = yaml.safe_load(_block(ROOT / "docs" / "your_data.md", "yaml", "name: mine"))
    if path.name == "your_reward.md":
        recipe |= yaml.safe_load(_block(path, "yaml", "my_rewards"))
        Path("my_rewards.py").write_text(_block(path, "python", "def ends_with_answer"))
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    if path.name == "reading_a_report.md":
        write_run(Path("runs/quickstart"), steps=30, every=10)


def _block(path: Path, language: str, word: str) -> str:
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
    (found,) = [text for text in blocks if word in text]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [p for p in DOCUMENTS if any(c.startswith("unmask") for c in runnable(p))], ids=lambda p: p.name
)
def test_the_commands_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = save_model(tmp_path / "model")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "path", list(sys.path))
    furnish(path)
    monkeypatch.setenv("COLUMNS", "160")
    failed = []
    for line in runnable(path):
        if not line.startswith("unmask "):
            continue
        monkeypatch.setattr(sys, "argv", ["unmask", *tiny(line, model)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        if stop.value.code:
            failed.append((line, stop.value.code, capsys.readouterr().err[-600:]))
    sys.modules.pop("my_rewards", None)
    assert not failed, failed
