"""Folders that are whole or absent, and readable by whom the umask says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from unmask.policies import convert as converting
from unmask.policies.adapters import attach_adapter, lora_config
from unmask.policies.loading import new_denoiser
from unmask.policies.saving import whole_folder
from unmask.policies.selfcheck import SelfCheckError
from unmask.policies.tokenizers import byte_tokenizer
from unmask.rl.run import save_policy

SIZE = {"hidden_size": 16, "layers": 1, "heads": 2, "mlp": 16}


@pytest.fixture(params=[0o022, 0o027])
def usual_mode(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


def test_a_whole_folder_takes_the_old_ones_place(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    for content in ("old", "new"):
        with whole_folder(target) as unfinished:
            (unfinished / content).write_text(content)
            assert unfinished.parent == target.parent and unfinished.name.startswith(".")
            assert content == "new" or not target.exists()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(target.parent.iterdir()) == [target]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "model") as unfinished:
        (unfinished / "good").touch()
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), whole_folder(tmp_path / "model") as unfinished:
            (unfinished / "bad").touch()
            raise error
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "good"]
    # What a killed process left behind is not mixed with what is written now.
    (tmp_path / ".model").mkdir()
    (tmp_path / ".model" / "stale").touch()
    with whole_folder(tmp_path / "model") as unfinished:
        (unfinished / "fresh").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "fresh"]


@pytest.mark.parametrize("adapter", [False, True])
def test_weights_are_readable_by_whom_the_umask_says(tmp_path: Path, usual_mode: int, adapter: bool) -> None:
    denoiser = new_denoiser(**SIZE)
    if adapter:
        denoiser = attach_adapter(denoiser, lora_config(denoiser, rank=2))
    save_policy(denoiser, tmp_path)
    assert any(tmp_path.rglob("*.safetensors")) and modes(tmp_path) == {usual_mode}


def test_a_saved_denoiser_is_readable_by_whom_the_umask_says(tmp_path: Path, usual_mode: int) -> None:
    new_denoiser(**SIZE).save(tmp_path / "model")
    assert modes(tmp_path / "model") == {usual_mode}


def test_a_conversion_that_fails_its_check_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config: Any = LlamaConfig(
        vocab_size=261, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "ar")
    byte_tokenizer().save_pretrained(tmp_path / "ar")

    def damaged(path: str, **options: Any) -> None:
        assert Path(path, "model.safetensors").is_file()
        raise SelfCheckError("the model is causal")

    monkeypatch.setattr(converting, "load_denoiser", damaged)
    with pytest.raises(SelfCheckError):
        converting.convert(str(tmp_path / "ar"), tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["ar"]
