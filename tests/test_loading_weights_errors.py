"""Damaged, foreign or unsupported checkpoint folders: one line that names the file, the rule and the way out."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unmask.policies import loading as module
from unmask.policies.denoiser import Denoiser
from unmask.policies.families import LAYOUTS, LLADA
from unmask.policies.layout import CheckpointError
from unmask.policies.loading import load_denoiser
from unmask.policies.resolving import check_config
from unmask.policies.selfcheck import SelfCheckError, self_check
from unmask.policies.tokenizers import byte_tokenizer
from unmask.recipes.loading import load_recipe
from unmask.rl.cli_summary import summary

GOLDEN = Path(__file__).parent / "fixtures" / "llada"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.transformer.ln_f.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    for name in ("config.json", WEIGHTS):
        shutil.copy(GOLDEN / name, path / name)
    return path


def load(path: Path | str, **options: Any) -> Denoiser:
    return load_denoiser(str(path), tokenizer=byte_tokenizer(), **options)


def config(path: Path, **changes: Any) -> None:
    """Change fields of config.json; `...` removes one."""
    fields = {**json.loads((path / "config.json").read_text()), **changes}
    (path / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))


def weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(path / WEIGHTS)
    change(state)
    save_file(state, path / WEIGHTS)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the tensors that are read from here on."""
    names: list[str] = []

    class Watched:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.file = safe_open(*arguments, **options)

        def __enter__(self) -> Watched:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            names.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(module, "safe_open", Watched)
    return names


def truncate(path: Path) -> None:
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-1000])


def garbage(path: Path) -> None:
    (path / WEIGHTS).write_bytes(b"not safetensors at all, but long enough to be looked at")


def pickle_only(path: Path) -> None:
    (path / WEIGHTS).unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def truncated_second_shard(path: Path) -> None:
    state = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    names = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    halves = [{key: state[key] for key in sorted(state)[i::2]} for i in range(2)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, path / name)
    (path / names[1]).write_bytes((path / names[1]).read_bytes()[:-1000])
    weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def missing_shard(path: Path) -> None:
    (path / INDEX).write_text(json.dumps({"weight_map": {NORM: "model-00001-of-00002.safetensors"}}))


FILES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no config", lambda p: (p / "config.json").unlink(), r"holds no config.json, so it is not a checkpoint folder"),
    ("config is no JSON", lambda p: (p / "config.json").write_text("{"), r"config.json: not valid JSON .*line 1"),
    ("config is a list", lambda p: (p / "config.json").write_text("[]"), r"holds a list, a JSON object is needed"),
    ("no weights", lambda p: (p / WEIGHTS).unlink(), r"there is no model.safetensors and no model.safetensors.index"),
    ("pickle", pickle_only, r"only pickle weights are here; unmask reads safetensors only"),
    ("truncated", truncate, r"model.safetensors: damaged or truncated safetensors .*download it again"),
    ("truncated shard", truncated_second_shard, r"model-00002-of-00002.safetensors: damaged or truncated safetensors"),
    ("garbage", garbage, r"model.safetensors: damaged or truncated safetensors"),
    ("missing shard", missing_shard, r"shard 'model-00001-of-00002.safetensors' of 1 is missing"),
    ("index is no JSON", lambda p: (p / INDEX).write_text("{"), r"index.json: not an index of shards"),
    ("index without a map", lambda p: (p / INDEX).write_text("{}"), r"index.json: not an index of shards"),
    (
        "missing tensor",
        lambda p: weights(p, lambda state: state.pop(NORM)),
        r"1 tensor is missing, first 'model.transformer.ln_f.weight'; is it another family",
    ),
    (
        "tensor that fits nothing",
        lambda p: weights(p, lambda state: state.update(extra=torch.zeros(3))),
        r"1 tensor is too many, first 'extra'; is it another family",
    ),
    (
        "stock name beside the vendor's",
        lambda p: weights(p, lambda state: state.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(112, 64)})),
        r"1 tensor is too many, first 'model.transformer.blocks.9.up_proj.weight'",
    ),
    (
        "one tensor under both names",
        lambda p: weights(p, lambda state: state.update({"model.norm.weight": torch.zeros(64)})),
        r"two tensors are 'model.transformer.ln_f.weight'; is it another family",
    ),
    (
        "misshapen tensor",
        lambda p: weights(p, lambda state: state.update({NORM: torch.zeros(63)})),
        r"'model.transformer.ln_f.weight' has shape \(63,\), config.json says \(64,\)",
    ),
    (
        "transposed tensor",
        lambda p: weights(p, lambda s: s.update({"model.transformer.blocks.0.up_proj.weight": torch.zeros(64, 112)})),
        r"blocks.0.up_proj.weight' has shape \(64, 112\), config.json says \(112, 64\)",
    ),
]


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_damaged_folders_are_refused_before_a_weight_is_read(
    folder: Path, damage: Callable[[Path], Any], message: str, read: list[str]
) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert not read


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_checking_a_recipe_refuses_them_as_well(
    folder: Path, damage: Callable[[Path], Any], message: str, read: list[str]
) -> None:
    """`unmask check` and `unmask train` refuse the same folders, the one without building a model."""
    byte_tokenizer().save_pretrained(folder)
    recipe = load_recipe("cj_grpo_tiny_arithmetic.yaml", [f"model.path={folder}", "model.device=cpu"])
    assert "sampler" in summary(recipe, "mine.yaml")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        summary(recipe, "mine.yaml")
    assert not read


def test_a_sound_folder_is_read_once(folder: Path, read: list[str]) -> None:
    load(folder)
    assert sorted(read) == sorted(load_file(folder / WEIGHTS))


def test_weights_that_are_not_numbers(folder: Path) -> None:
    weights(folder, lambda state: state[NORM].fill_(torch.nan))
    with pytest.raises(SelfCheckError, match=r"the logits are not finite; the weights are damaged"):
        load(folder)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["GPT2LMHeadModel"]}, r"\['GPT2LMHeadModel'\] belong to no known family \(llada, "),
    ({"architectures": None}, r"architectures \[\] belong to no known family"),
    ({"architectures": ...}, r"architectures \[\] belong to no known family"),
    ({"mask_token_id": 384}, r"mask_token_id 384 lies outside the embedding's 384 rows"),
    ({"mask_token_id": -1}, r"mask_token_id -1 lies outside the embedding's 384 rows"),
    ({"mask_token_id": 371}, r"mask_token_id 371 equals the EOS id"),
    ({"mask_token_id": "380"}, r"mask_token_id is '380', a whole number is needed"),
    ({"eos_token_id": [5, 380]}, r"mask_token_id 380 equals the EOS id"),
    ({"eos_token_id": 400}, r"eos_token_id 400 lies outside the embedding's 384 rows"),
    ({"vocab_size": ..., "embedding_size": ...}, r"vocab_size is None, a whole number is needed"),
    ({"embedding_size": 500}, r"wte.weight' has shape \(384, 64\), config.json says \(500, 64\)"),
    ({"d_model": ...}, r"config.json has no 'd_model', which family 'llada' needs"),
    ({"d_model": "64"}, r"config.json: .*hidden_size.*expected int, got str"),
    ({"n_layers": 4}, r"9 tensors are missing, first 'model.transformer.blocks.3.attn_norm.weight'"),
    ({"n_layers": 2}, r"9 tensors are too many, first 'model.transformer.blocks.2.attn_norm.weight'"),
    ({"include_qkv_bias": True}, r"12 tensors are missing, first 'model.transformer.blocks.0.attn_out.bias'"),
    *(
        ({key: value}, rf"{key} is {value!r}, but family 'llada' is loaded with {wanted!r} only")
        for key, value, wanted in (
            ("attention_layer_norm", True, False),
            ("input_emb_norm", True, False),
            ("scale_logits", True, False),
            ("alibi", True, False),
            ("rope", False, True),
            ("block_type", "sequential", "llama"),
            ("layer_norm_type", "default", "rms"),
            ("activation_type", "swiglu", "silu"),
        )
    ),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=lambda value: str(value)[:40])
def test_configs_that_do_not_fit(folder: Path, changes: dict[str, Any], message: str, read: list[str]) -> None:
    config(folder, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert not read


def test_the_family_can_be_named(folder: Path) -> None:
    config(folder, architectures=["MyOwnLLaDA"])
    assert load(folder, family="llada").family.name == "llada"
    with pytest.raises(CheckpointError, match=r"model.family: unknown family 'lada'. Did you mean 'llada'"):
        load(folder, family="lada")


def test_a_missing_mask_id_can_be_given(folder: Path) -> None:
    config(folder, mask_token_id=...)
    assert load(folder, mask_token_id=380).family.mask_token_id == 380
    with pytest.raises(CheckpointError, match="mask_token_id 371 equals the EOS id"):
        load(folder, mask_token_id=371)


def test_a_completion_must_be_able_to_end(folder: Path) -> None:
    config(folder, eos_token_id=..., pad_token_id=...)
    tokenizer = byte_tokenizer()
    assert load_denoiser(str(folder), tokenizer=tokenizer).family.eos_token_ids == (256,)
    tokenizer.eos_token = None
    with pytest.raises(CheckpointError, match=r"names an eos_token_id; write it into config.json"):
        load_denoiser(str(folder), tokenizer=tokenizer)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere-zz", "nowhere", "a/b/c"])
def test_paths_that_are_no_folder(path: str) -> None:
    """None of these can be a hub id, so that the hub is not asked."""
    with pytest.raises(CheckpointError, match=r"there is no folder '.*' \(a hub id looks like OWNER/NAME\)"):
        load(path)


def test_what_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def offline(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"'owner/name' is no local folder and the hub did not give it \(no rou"):
        load("owner/name")
    assert asked["name"] == "owner/name"
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in asked["allow_patterns"])


def test_a_foreign_vocabulary_is_never_read_with_bytes(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no tokenizer.json; copy the checkpoint's tokenizer files there"):
        load_denoiser(str(folder))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"its tokenizer files cannot be read"):
        load_denoiser(str(folder))


@pytest.mark.parametrize(
    ("name", "message"),
    [("4bit", r"4bit needs bitsandbytes; pip install 'unmask\[4bit\]'"), ("8bit", "model.quantization: '8bit' is not")],
)
def test_quantization_that_is_not_there(
    folder: Path, name: str, message: str, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(CheckpointError, match=message):
        load(folder, quantization=name)
    assert not read


# What each family's stock class can represent (the vendors' configs say these or nothing); `requires` refuses the rest.
REQUIRED = {
    "llada": "block_type layer_norm_type activation_type rope attention_layer_norm input_emb_norm scale_logits alibi",
    "llada_moe": "qk_layernorm clip_qkv moe_router_score_function moe_router_enable_expert_bias "
    "shared_expert_intermediate_size partial_rotary_factor router_num_group routed_scaling_factor",
    "llada2": "hidden_act use_sliding_window score_function moe_router_enable_expert_bias use_bias use_qkv_bias",
    "dream": "hidden_act use_sliding_window use_mrope",
    "fast_dllm_v2": "hidden_act use_sliding_window",
    **dict.fromkeys(("sdar", "sdar_moe", "rnd1"), "hidden_act use_sliding_window"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_stock_class_cannot_represent_is_refused(name: str) -> None:
    layout = LAYOUTS[name]
    assert [key for key, _ in layout.requires] == REQUIRED.get(name, "").split()
    for key, allowed in layout.requires:
        for value in allowed:
            check_config({key: value}, layout)
        for value in ({bool: not allowed[0], str: "other"}.get(type(allowed[0]), 3), 3, "other"):
            with pytest.raises(CheckpointError, match=f"config.json: {key} is {value!r}, but family '{name}'"):
                check_config({key: value}, layout)


def test_a_missing_tiny_model_says_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "tiny_folder", lambda: tmp_path)
    with pytest.raises(CheckpointError, match=r"'unmask:tiny' is missing from this installation .*unmask sft"):
        load(module.TINY)


# --- What the self-check refuses -------------------------------------------------------------------------------------


@pytest.fixture
def loaded() -> Denoiser:
    return load(GOLDEN)


def test_a_sound_model_passes_and_is_left_as_it_was(loaded: Denoiser) -> None:
    loaded.model.train()
    state = torch.get_rng_state()
    report = self_check(loaded)
    assert set(report) == {"bidirectional", "padding neutral", "mask id", "embedding", "RoPE", "alignment"}
    assert report["mask id"] == "380 of 384 rows, EOS [371]"
    assert loaded.model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_causal_model_is_refused(loaded: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded.model.config.is_causal = True
    with pytest.raises(SelfCheckError, match=r"the model is causal: its first position does not see the last token"):
        self_check(loaded)

    def causal(*arguments: Any) -> Any:
        built = original(*arguments)
        built.is_causal = True
        return built

    original = module.stock_config
    monkeypatch.setattr(module, "stock_config", causal)
    with pytest.raises(SelfCheckError, match="the model is causal"):
        load(GOLDEN)


def test_padding_that_is_attended_is_refused(loaded: Denoiser) -> None:
    class Careless(Denoiser):
        def hidden(self, input_ids_BT: torch.Tensor, **ignored: Any) -> torch.Tensor:
            return super().hidden(input_ids_BT)

    careless = Careless(loaded.model, loaded.family, loaded.tokenizer, loaded.vendor_config)
    with pytest.raises(SelfCheckError, match=r"padding changes the logits by .* of their scale"):
        self_check(careless)


def test_a_padding_row_is_refused(loaded: Denoiser) -> None:
    loaded.model.get_input_embeddings().padding_idx = 371
    with pytest.raises(SelfCheckError, match=r"the embedding has a padding_idx, whose row never learns"):
        self_check(loaded)


def test_a_mask_id_outside_the_embedding_is_refused(loaded: Denoiser) -> None:
    with pytest.raises(SelfCheckError, match=r"mask id 384 lies outside the embedding's 384 rows"):
        self_check(replace(loaded, family=replace(loaded.family, mask_token_id=384)))


def test_layouts_translate_both_ways() -> None:
    names = load_file(GOLDEN / WEIGHTS).keys()
    assert len(names) == 30
    assert all(LLADA.to_vendor(LLADA.to_stock(name)) == name for name in names)
    assert LLADA.to_stock("something.else") == "something.else"
