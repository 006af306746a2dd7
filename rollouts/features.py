"""What an unmasking policy sees of a canvas: a few numbers a position, from the statistics of the step's one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..recipes.registry import RecipeError
from .state import State

CLIP = 12.0  # nats; beyond it a token is as good as certain
LEAST_ALPHA = 0.01  # a smaller trade-off is told as this one
SEEN, STAYED = (
    "planner_seen",
    "planner_stayed",
)  # in the state's memory: likeliest tokens of the last step, for how long
# In the state's memory: what is kept of the last blocks, the newest last; sums over the tokens that the present one has
# decided, hidden states and entropies, and their number.
PAST, DECIDED = "block_past", "block_decided"
NEEDS = ("second", "entropy")


def observe(
    state: State, names: tuple[str, ...], alpha_A: Tensor, standing_AL: Tensor | None = None, *, hidden: int = 0
) -> Tensor:
    """Return `feature_ALF` in fp16, 0 at decided positions but for what says so of them; keeps persistence in memory.

    fp16 because that is how a trajectory stores them: what is trained on is what was acted on. `odds` log p/(1-p) of
    the likeliest token, clipped and by 4; `margin` p1 - p2; `entropy` H/(1 + H); `eos` whether the likeliest token
    ends the text; `persistence` k/(1 + k) after k steps in which it stayed; `frontier` log(1 + distance to the first
    open position)/4; `candidate` whether the step may choose it; `masked`; `time` step/L; `left` open share of the
    canvas; `alpha` log of the trade-off. Of the tokens `standing_AL`, which the step may take back: `standing` says
    that they are such, `current` is the log-odds of the token itself, clipped and by 4. Behind the features come the
    `hidden` numbers of the denoiser's last state at every position that was measured, 0 elsewhere.
    """
    statistics, masked_AL = state.statistics, state.masked_AL
    assert statistics is not None and statistics.second is not None and statistics.entropy is not None
    assert state.window_AL is not None
    stayed_AL = _stayed(state) if "persistence" in names else torch.zeros_like(statistics.best)
    length = masked_AL.shape[1]
    place_L = torch.arange(length, device=masked_AL.device)
    first_A1 = torch.where(masked_AL, place_L, length).amin(dim=1, keepdim=True)
    ends_AL = torch.zeros_like(masked_AL)
    for eos in state.eos_token_ids:
        ends_AL = ends_AL | (statistics.best == eos)
    open_only = {
        "odds": statistics.odds.clamp(-CLIP, CLIP) / 4,
        "margin": statistics.confidence.exp() - statistics.second.exp(),
        "entropy": statistics.entropy / (1 + statistics.entropy),
        "eos": ends_AL.float(),
        "persistence": stayed_AL / (1 + stayed_AL),
        "frontier": torch.log1p((place_L - first_A1).clamp(min=0)) / 4,
        "candidate": state.window_AL.float(),
    }
    of_row = {
        "time": state.step_A / length,
        "left": masked_AL.sum(dim=1) / length,
        "alpha": alpha_A.clamp(min=LEAST_ALPHA).log(),
    }
    found = {name: torch.where(masked_AL, value, 0.0) for name, value in open_only.items()}
    found |= {name: value[:, None].expand_as(masked_AL) for name, value in of_row.items()}
    found["masked"] = masked_AL
    if standing_AL is not None:
        assert statistics.current is not None
        log_odds_AL = statistics.current - torch.log(-torch.expm1(statistics.current))
        found["current"] = torch.where(standing_AL, log_odds_AL.clamp(-CLIP, CLIP) / 4, 0.0)
        found["standing"] = standing_AL
    feature_ALF = torch.stack([found[name].half() for name in names], dim=2)
    return torch.cat([feature_ALF, states(state, hidden)], dim=2) if hidden else feature_ALF


def states(state: State, width: int) -> Tensor:
    """Return `hidden_ALD` in fp16, 0 where nothing was measured; RecipeError where it has no states of that width."""
    if state.hidden is None:
        raise RecipeError("planner: reads hidden states, and this denoiser gives logits alone.")
    hidden_KD, flat_K = state.hidden
    if hidden_KD.shape[1] != width:
        raise RecipeError(f"planner: reads hidden states of width {width}, this denoiser's have {hidden_KD.shape[1]}.")
    rows, columns = state.canvas_AL.shape
    limit = torch.finfo(torch.float16).max
    table = torch.zeros(rows * columns + 1, width, dtype=torch.float16, device=hidden_KD.device)
    # One entry more takes the padding of static shapes.
    return table.index_copy(0, flat_K, hidden_KD.float().clamp(-limit, limit).half())[:-1].view(rows, columns, width)


def _stayed(state: State) -> Tensor:
    """Return for how many steps the likeliest token of each open position has been the same."""
    assert state.statistics is not None
    best_AL, memory = state.statistics.best, state.memory
    before_AL = memory.get(SEEN, torch.full_like(best_AL, -1))
    stayed_AL = memory.get(STAYED, torch.zeros_like(best_AL))
    stayed_AL = torch.where((before_AL == best_AL) & state.masked_AL, stayed_AL + 1, 0)
    memory[SEEN], memory[STAYED] = torch.where(state.masked_AL, best_AL, -1), stayed_AL
    return stayed_AL


def past_blocks(state: State, begins_A1: Tensor, blocks: int, width: int) -> Tensor:
    """Return `past_AMD` in fp16, of each of the last M = `blocks` blocks the mean hidden state and the mean entropy.

    As h/(1 + h) and behind the state; the newest block last, zeros where there was none. The block that has just ended
    joins them in rows where one begins (`begins_A1`). CtrlDiff pools the hidden states of finished blocks (arXiv
    2505.14455, eq. 11). A rollout has states where it asks for logits, that is at masks: here each token has the state
    and the entropy of the step that decided it.
    """
    memory, rows = state.memory, len(begins_A1)
    decided_AD = memory.get(DECIDED, begins_A1.new_zeros(rows, width + 2, dtype=torch.float32))
    past_AMD = memory.get(PAST, begins_A1.new_zeros(rows, blocks, width + 1, dtype=torch.float16))
    mean_AD = decided_AD[:, :-1] / decided_AD[:, -1:].clamp(min=1)
    mean_AD[:, -1] /= 1 + mean_AD[:, -1]
    ended_A1 = begins_A1 & (decided_AD[:, -1:] > 0)
    longer_AMD = torch.cat([past_AMD[:, 1:], mean_AD[:, None].half()], dim=1)
    past_AMD = torch.where(ended_A1[..., None], longer_AMD, past_AMD)
    memory[PAST], memory[DECIDED] = past_AMD, torch.where(ended_A1, 0.0, decided_AD)
    return past_AMD


def keep_decided(state: State, width: int, chosen_AL: Tensor) -> None:
    """Add hidden states (`width` numbers) and entropies of the positions that a step decides to the block's sums."""
    assert state.statistics is not None and state.statistics.entropy is not None
    hidden_AD = (states(state, width) * chosen_AL[..., None]).sum(dim=1, dtype=torch.float32)
    entropy_A1 = torch.where(chosen_AL, state.statistics.entropy, 0.0).sum(dim=1, keepdim=True)
    added = [hidden_AD, entropy_A1.float(), chosen_AL.sum(dim=1, keepdim=True)]
    state.memory[DECIDED] = state.memory[DECIDED] + torch.cat(added, dim=1)
