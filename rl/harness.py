"""Any denoiser and sampler as a model of lm-evaluation-harness (extra `eval`): generation and likelihoods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ..policies.denoiser import Denoiser
from ..recipes.protocols import load_protocol
from ..recipes.registry import RecipeError
from ..rollouts.engine import denoise
from ..rollouts.sampler import Sampler, build_sampler
from ..rollouts.worker import pad_left
from .evaluate import EVALUATION_STEP
from .likelihood import is_greedy, likelihood_bound
from .targets import open_target

try:
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:  # the extra is not installed; the constructor says so
    LM = None


class DenoiserLM(LM or object):  # type: ignore[misc]
    """A model for `lm_eval.simple_evaluate(model=...)`.

    Completions are written on a canvas of `canvas` tokens by `sampler` and cut at the task's stop strings; the canvas
    takes the place of `max_gen_toks`, the sampler's temperature that of `temperature`. Likelihoods are bounds from
    `draws` masked copies of a text (`likelihood_bound`). `batch` rows share a forward. Contexts are read as they are:
    pass `apply_chat_template=True` for a model that was taught turns. Raises RecipeError without lm-eval.
    """

    def __init__(
        self, denoiser: Denoiser, sampler: Sampler, *, canvas: int, draws: int = 128, seed: int = 0, batch: int = 16
    ) -> None:
        if LM is None:
            raise RecipeError("harness: the package lm-eval is missing; `pip install 'unmask[eval]'`.")
        super().__init__()
        self.denoiser, self.sampler, self.canvas = denoiser, sampler, canvas
        self.draws, self.seed, self.batch, self.window = draws, seed, batch, 1024
        self.nfe = 0  # calls of the denoiser by generation so far, summed over completions

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm-eval files cached requests."""
        return str(self.denoiser.tokenizer.name_or_path)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the tokenizer's template, which lm-eval writes into its results."""
        return str(self.denoiser.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the text of a prompt."""
        text = self.denoiser.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return str(text)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; special tokens that it spells are read as such."""
        return self.denoiser.tokenizer(text, add_special_tokens=False)["input_ids"]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return a completion for every request (context, {until, ...})."""
        found: list[str] = []
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until")
        for start in range(0, len(requests), self.batch):
            chunk = [request.args for request in requests[start : start + self.batch]]
            texts = self._complete([self.encode(context) or [self._prefix] for context, _ in chunk], start)
            for text, (context, options) in zip(texts, chunk, strict=True):
                until = options.get("until") or []
                for stop in [until] if isinstance(until, str) else until:
                    text = text.split(stop)[0] if stop else text
                found.append(text)
                self.cache_hook.add_partial("generate_until", (context, options), text)
            bar.update(len(chunk))
        bar.close()
        return found

    def _complete(self, prompts: list[list[int]], first_id: int) -> list[str]:
        family, tokenizer, device = self.denoiser.family, self.denoiser.tokenizer, self.denoiser.device
        prompt_BQ, mask_BQ = pad_left(prompts, tokenizer.pad_token_id or 0, multiple=family.prompt_multiple)
        trajectory = denoise(
            self.denoiser,
            self.sampler,
            prompt_BQ.to(device),
            mask_BQ.to(device),
            torch.full((len(prompts), self.canvas), family.mask_token_id, device=device),
            torch.arange(first_id, first_id + len(prompts), device=device),
            seed=self.seed,
            step=EVALUATION_STEP,
        ).to("cpu")
        self.nfe += int(trajectory.steps_B.sum())
        rows = zip(trajectory.tokens_BL.tolist(), trajectory.length_B.tolist(), strict=True)
        ids = [[token for token in tokens[:length] if token != family.mask_token_id] for tokens, length in rows]
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    @property
    def _prefix(self) -> int:
        """The token that stands for an empty context."""
        tokenizer = self.denoiser.tokenizer
        return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else self.denoiser.family.end_id

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (bound of log p in nats, whether greedy decoding writes it) for every request (context, text)."""
        found = []
        for request in tqdm(requests, disable=disable_tqdm, desc="loglikelihood"):
            context, target = self._pair(*request.args)
            answer = (self._bound(context, target), is_greedy(self.denoiser, context, target))
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
            found.append(answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the bound of log p of whole texts, in windows of `window` tokens that see the one before."""
        found = []
        for request in tqdm(requests, disable=disable_tqdm, desc="loglikelihood_rolling"):
            (text,) = request.args
            windows = get_rolling_token_windows(self.encode(text), self._prefix, self.window, 1)
            total = sum(self._bound(*map(list, make_disjoint_window(pair))) for pair in windows)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            found.append(total)
        return found

    def _bound(self, context: list[int], target: list[int]) -> float:
        return likelihood_bound(self.denoiser, context, target, draws=self.draws, seed=self.seed, batch=self.batch)

    def _pair(self, context: str, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of both; blanks at the end of the context belong to the text, as a tokenizer joins them."""
        kept = context.rstrip()
        text, context = context[len(kept) :] + text, kept
        whole, before = self.encode(context + text), self.encode(context)
        return (before or [self._prefix]), whole[len(before) :]


def load(target: str, protocol: str, *, overrides: Sequence[str] = (), **options: Any) -> DenoiserLM:
    """Return a target (run, checkpoint, model) that decodes as a protocol says, as a model of lm-eval.

    `overrides` are those of `unmask evaluate` (`model.dtype=bfloat16`), `options` those of DenoiserLM.
    """
    fixed = load_protocol(protocol)
    _, denoiser = open_target(target, overrides)
    sampler = build_sampler(fixed.sampler.model_dump(), temperature=fixed.temperature)
    return DenoiserLM(denoiser, sampler, canvas=fixed.canvas, **options)
