"""Preferences: pairs of completions, of which the policy is to favour one (VRPO of LLaDA 1.5, arXiv 2505.19223).

    loss = mean over pairs of -log sigmoid(beta [(B(w) - B_ref(w)) - (B(l) - B_ref(l))]) - sft x B(w) / |w|

B is an estimate of the ELBO of a completion from `draws` canvases (likelihood_rl.md A6): the number of hidden tokens is
stratified over the draws, each draw has one mask of its own, and policy and reference score the very same canvases, so
that what the masks add to both cancels.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..policies.layout import Family
from ..policies.tokenizers import completion_ids, prompt_ids
from ..recipes.preferences import PreferenceRecipe
from ..recipes.registry import RecipeError
from ..rollouts.forward import LogitSource
from ..rollouts.trajectory import NEVER, PAD, SAMPLED, Trajectory
from ..rollouts.worker import pad_left
from .distributed import total
from .likelihoods import random_mask
from .replay import chunks, replay, replay_all
from .views import Views

COLUMNS = ("prompt", "chosen", "rejected")
Pair = dict[str, Any]


@dataclass(frozen=True)
class Preference:
    """The loss of pairs and how its likelihoods are estimated.

    `beta` weighs the difference of log-ratios, `draws` is the number of canvases of each completion. `per_token`
    divides each ELBO by its number of tokens (the released code divides by the padded length, which makes beta hundreds
    of times smaller). `sft` weighs the likelihood of the chosen completion, a token. `chunk` canvases share a forward.
    """

    beta: float = 0.2
    draws: int = 8
    per_token: bool = False
    sft: float = 0.0
    chunk: int = 32

    def __post_init__(self) -> None:
        if not self.beta > 0 or not self.sft >= 0:
            raise RecipeError(f"preference: beta {self.beta} must be positive and sft {self.sft} at least 0.")
        if self.draws < 1 or self.chunk < 1:
            raise RecipeError(f"preference: draws {self.draws} and chunk {self.chunk} must be at least 1.")

    def loss(self, views: Views, logprob_K: Tensor, reference_K: Tensor, pairs: float) -> tuple[Tensor, Tensor]:
        """Return (loss, `margin_P`) of P pairs, differentiable in `logprob_K`; rollouts 2p and 2p + 1 are pair p.

        `margin_P` is the argument of the sigmoid over beta, and `pairs` their number over all ranks.
        """
        bound_B, length_B = self.elbo(views, logprob_K), views.count_B.to(logprob_K.dtype)
        gained_B = bound_B - self.elbo(views, reference_K)
        if self.per_token:
            gained_B = gained_B / length_B
        margin_P = gained_B[0::2] - gained_B[1::2]
        loss = -F.logsigmoid(self.beta * margin_P).sum()
        if self.sft:
            loss = loss - self.sft * (bound_B / length_B)[0::2].sum()
        return loss / pairs, margin_P

    def elbo(self, views: Views, logprob_K: Tensor) -> Tensor:
        """Return `bound_B`, the estimated ELBO of each completion in nats."""
        assert views.factor_K is not None
        empty_B = logprob_K.new_zeros(len(views.trajectory))
        return empty_B.index_add(0, views.row_K, views.factor_K.to(logprob_K.dtype) / views.draws * logprob_K)

    def backward(
        self, policy: LogitSource, reference: LogitSource, trajectory: Trajectory, *, rng: torch.Generator
    ) -> dict[str, float]:
        """Add the gradient of a batch of pairs to the parameters' `.grad`; return what it says of the pairs.

        The loss is no sum over canvases, so that a first pass without grad gives all log-probs, the loss one
        coefficient a token, and a second pass back-propagates chunk by chunk. Every rank must call this.
        """
        views = random_mask(trajectory, rng=rng, draws=self.draws)
        reference_K = replay_all(reference, views, self.chunk).logprob_A
        leaf_K = replay_all(policy, views, self.chunk).logprob_A.requires_grad_()
        pairs = total(len(trajectory) / 2)
        loss, margin_P = self.loss(views, leaf_K, reference_K, pairs)
        (coefficient_K,) = torch.autograd.grad(loss, leaf_K)
        for start, stop in chunks(views, self.chunk):
            share_K = coefficient_K[views.tokens(start, stop)]
            torch.dot(share_K, replay(policy, views.part(start, stop)).logprob_A).backward()
        margin_P = margin_P.detach().double()
        return {
            "loss": total(loss.item()),
            "preference/margin": total(float(margin_P.sum())) / pairs,
            "preference/right": total(float((margin_P > 0).sum())) / pairs,
            "preference/chosen_elbo": total(float(self.elbo(views, leaf_K.detach())[0::2].sum())) / pairs,
        }


def paired(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, family: Family, *, canvas: int, first_id: int = 0
) -> Trajectory:
    """Return the completions of P pairs as 2P rollouts, chosen and rejected in turn; every token may be scored.

    `first_id` is the number of the first pair in the batch of all ranks, by which canvases are drawn. RecipeError for a
    completion of more than `canvas` tokens.
    """
    prompts: list[list[int]] = []
    replies: list[list[int]] = []
    for pair in pairs:
        asked = prompt_ids(tokenizer, pair["prompt"])
        for name in COLUMNS[1:]:
            prompts.append(asked)
            replies.append(_reply(pair, name, tokenizer, family))
            if len(replies[-1]) > canvas:
                raise RecipeError(
                    f"pairs: a {name} completion has {len(replies[-1])} tokens, the canvas {canvas}; raise it or leave "
                    "the pair out."
                )
    prompt_BQ, prompt_mask_BQ = pad_left(prompts, tokenizer.pad_token_id or 0, multiple=family.prompt_multiple)
    # What lies behind a completion is hidden whatever is drawn: open positions, as the rollout of an equal canvas has.
    rows = [reply + [family.mask_token_id] * (canvas - len(reply)) for reply in replies]
    tokens_BL = torch.tensor(rows)
    source_BL = torch.where(tokens_BL == family.mask_token_id, PAD, SAMPLED).to(torch.int8)
    born_BL = torch.where(source_BL == SAMPLED, 0, NEVER).to(torch.int16)
    return Trajectory(
        prompt_BQ=prompt_BQ,
        prompt_mask_BQ=prompt_mask_BQ,
        tokens_BL=tokens_BL,
        source_BL=source_BL,
        born_BL=born_BL,
        rank_BL=born_BL,
        logprob_BL=torch.zeros(tokens_BL.shape),
        steps_B=torch.ones(len(rows), dtype=torch.long),
        rollout_id_B=torch.arange(len(rows)) + 2 * first_id,
        temperature=1.0,
        mask_token_id=family.mask_token_id,
        eos_token_ids=family.eos_token_ids,
        banned_token_ids=(family.mask_token_id,),
    )


def _reply(pair: Pair, name: str, tokenizer: PreTrainedTokenizerBase, family: Family) -> list[int]:
    """Return the ids of a completion: those that a rollout drew, where the pair has them, else those of its text.

    A text that is tokenized again need not give the tokens that were drawn.
    """
    drawn = pair.get(f"{name}_ids")
    if drawn is None:
        return completion_ids(tokenizer, pair[name], family.end_id)
    ids = [token for token in drawn if token != family.mask_token_id]
    ends = [place for place, token in enumerate(ids) if token in family.eos_token_ids]
    return ids[: ends[0] + 1] if ends else ids


def pairs_of(recipe: PreferenceRecipe) -> list[Pair]:
    """Return the pairs of a recipe, from its file or its run; RecipeError where there are none."""
    source = recipe.pairs
    if source.file is not None:
        return read_pairs(Path(source.file).expanduser())
    assert source.run is not None
    folder = Path(source.run).expanduser()
    pairs = pairs_of_run(folder, margin=source.margin, most=source.most, seed=recipe.run.seed)
    if not pairs:
        raise RecipeError(f"pairs.run: '{source.run}' has no group with rewards {source.margin:g} apart.")
    return pairs


def read_pairs(path: Path) -> list[Pair]:
    """Return the pairs of a JSON-lines file; RecipeError naming line and column where one is missing."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(f"pairs.file: cannot read '{path}' ({reason}).") from error
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
        except json.JSONDecodeError as error:
            raise RecipeError(f"{path}, line {number}: {error}; each line is an object.") from error
        for column in COLUMNS:
            if not isinstance(pair, Mapping) or not pair.get(column):
                raise RecipeError(f"{path}, line {number}: there is no '{column}'; a pair has {', '.join(COLUMNS)}.")
        pairs.append(dict(pair))
    if not pairs:
        raise RecipeError(f"{path}: holds no pairs.")
    return pairs


def pairs_of_run(folder: Path, *, margin: float = 0.0, most: int = 1, seed: int = 0) -> list[Pair]:
    """Return pairs from a run's stored rollouts: of each group the best against the worst, `most` of them at most.

    A pair's rewards differ by more than `margin`; those of equal reward are put in an order drawn by `seed`. Rollouts
    without a reward are left out. The pairs carry the tokens that were drawn beside the texts.
    """
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for path in sorted((folder / "rollouts").glob("step-*.parquet")):
        table = pyarrow.parquet.read_table(path, columns=["step", "group", "prompt", "completion", "tokens", "reward"])
        for row in table.to_pylist():
            if row["reward"] is not None:
                groups.setdefault((row["step"], row["group"]), []).append(row)
    if not groups:
        raise RecipeError(f"{folder}: stored no rollouts with rewards; set run.log_rollouts_every.")
    draw = partial(_pairs_of_group, margin=margin, most=most)
    return [pair for key, rows in sorted(groups.items()) for pair in draw(rows, rng=random.Random(f"{seed}/{key}"))]


def _pairs_of_group(rows: list[dict[str, Any]], *, margin: float, most: int, rng: random.Random) -> Iterable[Pair]:
    rng.shuffle(rows)
    ranked = sorted(rows, key=lambda row: -row["reward"])
    for place in range(min(most, len(ranked) // 2)):
        best, worst = ranked[place], ranked[-1 - place]
        if best["reward"] - worst["reward"] > margin and best["completion"] != worst["completion"]:
            yield {
                "prompt": _prompt(best["prompt"]),
                "chosen": best["completion"],
                "rejected": worst["completion"],
                "chosen_ids": best["tokens"],
                "rejected_ids": worst["tokens"],
                "margin": best["reward"] - worst["reward"],
            }


def _prompt(text: str) -> Any:
    """Return a stored prompt: messages are kept as JSON."""
    if text.startswith("[{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text
    return text
