"""Static shapes: no look of the host at a tensor inside a step, and buckets of rows; a CPU twin of what a GPU needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unmask.policies.denoiser import Denoiser
from unmask.policies.loading import new_denoiser
from unmask.recipes.loading import load_samplers
from unmask.rollouts import engine, measures
from unmask.rollouts.engine import denoise
from unmask.rollouts.sampler import build_sampler

L, EOS, MASK = 64, 256, 257
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2", "unique_consecutive", "equal")


class Waits(TorchDispatchMode):
    """Notes every operation for which a host waits for its device: scalars read, shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITS or masks:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model() -> Denoiser:
    made = new_denoiser(hidden_size=16, layers=1, heads=2, mlp=32, seed=1)
    with torch.no_grad():
        made.model.lm_head.weight.mul_(10)
    return made


# Windows of a block and of the canvas, statistics everywhere, drawn scores and their tail, lists a position, memory.
KINDS = (
    *("llada_low_confidence", "dream_entropy", "ass", "entropy_bounded"),
    *("klass", "credit_decoding", "rho_eos", "saber", "unsupervised_guidance", "odd"),
)


@pytest.mark.parametrize(
    "name", [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in load_samplers()]
)
def test_a_step_does_not_wait_for_the_device(model: Denoiser, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every wait of a static rollout lies between looks: with one look for all steps there are but a few."""
    section = {**load_samplers()[name]["sampler"], "eos": {"rule": "none"}}
    sampler = build_sampler(section, temperature=1.0)
    prompt_BQ = torch.randint(0, 256, (3, 5), generator=torch.Generator().manual_seed(0))
    mask_BQ = torch.ones_like(prompt_BQ, dtype=torch.bool)
    counts = []
    for every in (10**6, 4):
        monkeypatch.setattr(engine, "CHECK_EVERY", min(every, L))
        with Waits() as waits:
            denoise(model, sampler, prompt_BQ, mask_BQ, torch.full((3, L), MASK), torch.arange(3), seed=0, static=True)
        counts.append(waits.found)
    # One look for all steps: what is left are those of the start and the end, however many steps there were.
    assert len(counts[0]) <= 40, f"{len(counts[0])} waits: {sorted(set(counts[0]))}"


def test_rows_leave_in_powers_of_two(model: Denoiser) -> None:
    """Six rows whose ends lie far apart: the calls see 6, then 4, 2, 1 rows, and never fewer than are live."""

    class Recorder:
        family, device = model.family, model.device

        def __init__(self) -> None:
            self.rows: list[int] = []

        def hidden(self, input_ids_BT: Tensor, **options: Any) -> Tensor:
            self.rows.append(len(input_ids_BT))
            return model.hidden(input_ids_BT, **options)

        def head(self, hidden: Tensor) -> Tensor:
            return model.head(hidden)

    recorder = Recorder()
    canvas_BL = torch.full((6, L), MASK)
    for row in range(6):
        canvas_BL[row, 8 * (row + 1) :] = 65  # given: 8, 16, ... positions are open
    sampler = build_sampler({"schedule": {"name": "blocks", "size": 8, "per_step": 1}, "eos": {"rule": "none"}})
    prompt_BQ = torch.zeros(6, 3, dtype=torch.long)
    mask_BQ = torch.ones_like(prompt_BQ, dtype=torch.bool)
    found = denoise(recorder, sampler, prompt_BQ, mask_BQ, canvas_BL, torch.arange(6), seed=0, static=True)
    assert found.steps_B.tolist() == [8, 16, 24, 32, 40, 48]
    live = [sum(steps > t for steps in found.steps_B.tolist()) for t in range(48)]
    assert all(rows in (6, 4, 2, 1) and rows >= alive for rows, alive in zip(recorder.rows, live, strict=True))
    assert recorder.rows == [6] * 16 + [4] * 16 + [2] * 8 + [1] * 8


class Largest(TorchDispatchMode):
    """Notes the most numbers that one tensor of a run has."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else (found,):
            if isinstance(value, Tensor):
                self.numbers = max(self.numbers, value.untyped_storage().nbytes() // value.element_size())
        return found


class Wide:
    """The model with 4,096 tokens, so that logits outweigh everything else; ids that it has not are taken modulo."""

    def __init__(self, model: Denoiser) -> None:
        self.inner, self.device = model, model.device
        self.family = replace(model.family, vocab_size=4096)
        self.matrix_DV = torch.randn(16, 4096, generator=torch.Generator().manual_seed(0))

    def hidden(self, input_ids_BT: Tensor, **options: Any) -> Tensor:
        return self.inner.hidden(input_ids_BT % self.inner.family.vocab_size, **options)

    def head(self, hidden: Tensor) -> Tensor:
        return hidden @ self.matrix_DV


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_a_step_never_holds_logits_of_the_canvas(
    model: Denoiser, name: str, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever positions are asked for, the largest tensor is a chunk of logits: 16 positions of 4 x 64."""
    rows, chunk = 4, 16 * 4096
    monkeypatch.setitem(measures.CHUNK_ENTRIES, "cpu", chunk)
    section = {**load_samplers()[name]["sampler"], "eos": {"rule": "none"}, "max_steps": 2}
    sampler = build_sampler(section, temperature=1.0)
    prompt_BQ = torch.randint(0, 256, (rows, 5), generator=torch.Generator().manual_seed(0))
    mask_BQ, canvas_BL = torch.ones_like(prompt_BQ, dtype=torch.bool), torch.full((rows, L), MASK)
    with Largest() as largest:
        denoise(Wide(model), sampler, prompt_BQ, mask_BQ, canvas_BL, torch.arange(rows), seed=0, static=static)
    assert largest.numbers <= chunk, f"{largest.numbers / 4096:.0f} rows of logits"
