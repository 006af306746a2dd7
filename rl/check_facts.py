"""What `unmask check` says of exploration and of preference recipes; no weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..recipes.crosschecks import notes
from ..recipes.preferences import PreferenceRecipe
from ..recipes.registry import SLOTS
from ..recipes.schema import ModelSection
from ..recipes.sections import ExplorationSection
from .preference import pairs_of


def trained_words(model: ModelSection) -> str:
    """Return what of a model is trained."""
    lora = model.lora
    return "all weights" if lora is None else f"LoRA rank {lora.rank}, alpha {lora.alpha:g}"


def attempts(exploration: ExplorationSection) -> int:
    """Return how many rollouts, at most, are drawn for one that is learnt from: refills, and hints in each of them.

    A user's own part for hints says so by an attribute `again`, the times a failed group is rolled out once more;
    without one, once is assumed.
    """
    more = 0 if exploration.hints is None else getattr(SLOTS["exploration"].get(exploration.hints["name"]), "again", 1)
    return (1 + exploration.refills) * (1 + more)


def exploration_words(exploration: ExplorationSection, words: Any) -> str | None:
    """Return what is done for groups that fail or tell nothing, `words` naming a part; None where nothing is."""
    said = []
    if exploration.hints is not None:
        said.append(f"a failed group again by {words(exploration.hints)}")
    if exploration.filter is not None:
        said.append(f"groups kept by {words(exploration.filter)}, {exploration.refills} refills")
    if exploration.successes:
        said.append(f"{exploration.successes} past successes")
    if not said:
        return None
    return f"{'; '.join(said)}: at most {attempts(exploration)} x the rollouts"


def preference_facts(recipe: PreferenceRecipe, target: str) -> dict[str, Any]:
    """Return what a preference recipe will do, key by key, with the state of its pairs and the next command."""
    section, source, launch = recipe.preference, recipe.pairs, f"unmask prefer {target}"
    place = source.file or source.run
    assert place is not None
    canvases = 2 * section.batch * section.draws
    facts: dict[str, Any] = {
        "recipe": recipe.name,
        "model": f"{recipe.model.path}, {recipe.model.dtype}, {trained_words(recipe.model)}",
        "pairs": place if source.run is None else f"best against worst rollouts of {place}, {source.most} a group",
        "loss": f"VRPO, beta {section.beta:g}, {section.draws} canvases a completion, "
        f"sft {section.sft:g}{', ELBO a token' if section.per_token else ''}",
        "canvas": source.canvas,
        "pairs_an_update": section.batch,
        # The reference and the policy without gradient, then the policy with it.
        "forwards_an_update": 3 * canvases,
        "updates": recipe.optim.steps,
        "notes": notes(recipe),
    }
    if not Path(place).expanduser().exists():
        return facts | {
            "data": f"not checked: there is no '{place}' yet",
            "next": f"put the pairs at {place}, then {launch}",
        }
    count = len(pairs_of(recipe))
    epochs = recipe.optim.steps * section.batch / count
    return facts | {"data": f"{count} pairs, seen {epochs:.1f} times each", "next": launch}
