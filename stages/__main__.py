"""python -m stages vision|align|pretrain|instruct --preset tiny --out DIR [--init DIR] [--set key=value ...]."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from . import STAGES

DATA_KEYS = {"recipe": str, "image_size": int, "num_slices": int, "vocab_size": int, "max_slices": int,
             "mask_share": float, "word_share": float, "image_share": float, "kspace_size": int,
             "across_share": float, "num_cascades": int, "cascade_width": int,
             "reuse": int, "tellings": int, "text_layers": int, "stem_widths": lambda v: [int(n) for n in v.split(",")],
             "extra_blocks": lambda v: [int(n) for n in v.split(",")]}
SHAPES = {"num_cascades", "cascade_width", "stem_widths", "extra_blocks"}
"""Settings of the model's configuration; what has another shape than in --init begins anew."""
RATE = "learning_rate."
"""`--set learning_rate.GLOB=RATE` goes before the stage's own rates; 0 freezes."""


def build_recipe(name: str, data: str | None, model_size: int, settings: dict[str, Any], *, kspace: bool, numbers: Any) -> Any:
    """The recipe of a name, at the model's image size."""
    from data_recipes import Phantom, Synthetic

    slices = {"num_slices": settings["num_slices"]} if "num_slices" in settings else {}
    size = settings.get("kspace_size", 96) if kspace else 0
    if name == "phantom":
        return Phantom(image_size=model_size, kspace_size=size, mirror=kspace, **slices)
    if name == "synthetic":
        if not data:
            raise ValueError("recipe synthetic needs --data, the folder of label maps (or OMNIMRI_DATA)")
        across = settings.get("across_share", 0.0)
        return Synthetic(data, numbers=numbers, image_size=model_size, kspace_size=size, mirror=kspace, across_share=across, **slices)
    raise ValueError(f"unknown recipe {name!r}; expected phantom or synthetic")


def recipe_tokenizer(*, vocab_size: int, records: int = 400, wide: bool = False) -> Any:
    """A tokenizer trained on the recipes' wordings: records of a phantom, whose text has every recipe's grammar.

    Args:
        wide: In every wording.
    """
    from data_recipes import Phantom
    from data_recipes.describe import describe
    from data_recipes.recipe import generator
    from omnimri.anatomy import NAMES
    from omnimri.conversation import QUERY_REQUEST, card, query_messages
    from omnimri.tokens import train_tokenizer

    source = Phantom(image_size=48, num_slices=4, kspace_size=0)
    texts = [n for n in NAMES for _ in range(30)] + [f"{card('axial', None, ())} {QUERY_REQUEST} user assistant"] * 50
    texts += [query_messages()[1].text]
    for i in range(records):
        record = source.record(7, i)
        if wide:
            record = describe(record, generator(7, "wide", i), wide=True)
        texts.append(f"{card(record.plane, record.sequence, record.lesion_places, record.signal)} {record.caption}")
        texts += [m.text for chat in record.conversations for m in chat]
    return train_tokenizer(texts, vocab_size)


def new_tokenizer(settings: dict[str, Any]) -> Any:
    """The tokenizer that settings ask for."""
    return recipe_tokenizer(vocab_size=settings.get("vocab_size", 2048), wide=settings.get("recipe") == "synthetic")


def new_model(name: str, settings: dict[str, Any], *, base: Path | None, vision: Path | None) -> tuple[Any, Any]:
    """A model of a preset and its tokenizer; `small` is built on the fetched language model.

    Args:
        base: Folder of a base language model (`omnimri.weights`).
        vision: Folder of pretrained weights for the encoder.

    Raises:
        ValueError: base weights are missing or do not fit.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig

    from omnimri.checkpoint import load_tokenizer
    from omnimri.model.config import preset
    from omnimri.model.omnimri import OmniMRI
    from omnimri.tokens import extend_tokenizer, token_ids
    from omnimri.weights import LANGUAGE, base_of, folder_of

    base = base or (folder_of(LANGUAGE) if name == "small" else None)
    named = base_of(base) if base else {}
    tokenizer = extend_tokenizer(load_tokenizer(base)) if base else new_tokenizer(settings)
    config = preset(name, vocab_size=len(tokenizer), image_size=settings.get("image_size"))
    for key in SHAPES & set(settings):
        setattr(config, key, settings[key])
    config.text_config.num_hidden_layers = settings.get("text_layers", config.text_config.num_hidden_layers)
    if base:
        config.text_config = AutoConfig.from_pretrained(str(base), local_files_only=True)
        config.base, config.num_token_rows = named, len(tokenizer) - config.text_config.vocab_size
    config.token_ids = token_ids(tokenizer)
    model = OmniMRI(config)
    if base:
        model.load_base(base)
    if vision:
        load_vision(model, load_file(vision / "model.safetensors"))
    return model, tokenizer


def load_vision(model: Any, tensors: dict[str, Any]) -> None:
    """Put a pretrained encoder in; its position embeddings are interpolated to this model's lattice.

    Raises:
        ValueError: it is of another width, depth or patch size.
    """
    import torch

    own, name = model.vision.backbone.state_dict(), "embeddings.position_embeddings"
    if name in tensors and name in own and tensors[name].shape[2:] == own[name].shape[2:]:
        cls, grid = tensors[name][:, :1], tensors[name][:, 1:]
        old, new = (round(n**0.5) for n in (grid.shape[1], own[name].shape[1] - 1))
        square = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
        square = torch.nn.functional.interpolate(square, size=(new, new), mode="bicubic", align_corners=False, antialias=True)
        tensors = tensors | {name: torch.cat([cls, square.flatten(2).transpose(1, 2).to(cls.dtype)], 1)}
    wrong = {n for n in own.keys() | tensors.keys() if n not in own or n not in tensors or own[n].shape != tensors[n].shape}
    if wrong:
        raise ValueError(f"expected encoder weights of this preset, got others: {len(wrong)} tensors differ, such as {min(wrong)}")
    model.vision.backbone.load_state_dict(tensors)


def main(argv: list[str] | None = None) -> int:
    """Run one stage."""
    parser = argparse.ArgumentParser(prog="python -m stages", description=__doc__)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--preset", default="tiny", help="tiny, small, base or large")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="a run or model directory whose weights to start from")
    parser.add_argument("--base", type=Path, help="folder of a base language model (default for small: what `omnimri fetch` fetched)")
    parser.add_argument("--vision", type=Path, help="folder of a pretrained encoder to start from")
    parser.add_argument("--data", default=os.environ.get("OMNIMRI_DATA"), help="folder of label maps for `synthetic`")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="steps, batch_size, recipe, ...")
    args = parser.parse_args(argv)

    import torch

    from data_recipes import Mixture
    from data_recipes.synthetic import CHOOSING_MAPS, TRAINING_MAPS
    from omnimri.checkpoint import load_tokenizer, newest_good, resolve
    from omnimri.model.config import OmniMRIConfig
    from omnimri.model.omnimri import OmniMRI
    from omnimri.tokens import token_ids
    from omnimri.weights import find_base

    from .engine import FitConfig, fit

    stage = importlib.import_module(STAGES[args.stage])
    types = {f.name: f.type for f in fields(FitConfig)}
    settings: dict[str, Any] = {}
    rates: dict[str, float] = {}
    try:
        for item in args.set:
            key, sep, value = item.partition("=")
            if sep and key.startswith(RATE):
                rates[key.removeprefix(RATE)] = float(value)
                continue
            if not sep or (key not in DATA_KEYS and key not in types) or key == "learning_rate":
                known = [*sorted({*DATA_KEYS, *types} - {"learning_rate"}), f"{RATE}GLOB"]
                raise ValueError(f"--set {item!r}: expected KEY=VALUE with a key from {', '.join(known)}")
            convert = DATA_KEYS.get(key) or {"int": int, "float": float, "bool": lambda v: v == "true", "str": str}[types[key]]
            settings[key] = convert(value)
        seed = settings.get("seed", 0)
        resumed = newest_good(args.out)
        source_of_weights = resumed or (resolve(args.init) if args.init else None)
        torch.manual_seed(seed)
        if source_of_weights is not None:
            tokenizer = load_tokenizer(source_of_weights)
            config = OmniMRIConfig.from_pretrained(str(source_of_weights))
            for key in SHAPES & set(settings):
                setattr(config, key, settings[key])
            if resumed is None and {"vocab_size", "text_layers"} & set(settings):
                if config.base:
                    raise ValueError("expected no vocab_size or text_layers for a model on a base language model, which has its own")
                # A language model of another size begins anew; the rest is handed over.
                tokenizer = new_tokenizer(settings)
                config.token_ids, config.text_config.vocab_size = token_ids(tokenizer), len(tokenizer)
                config.text_config.num_hidden_layers = settings.get("text_layers", config.text_config.num_hidden_layers)
            lora, config.lora_rank = config.lora_rank, 0
            model = OmniMRI(config)
            if lora:
                model.add_lora(lora)
            if config.base:
                model.load_base(find_base(config.base, args.base))
        else:
            model, tokenizer = new_model(args.preset, settings, base=args.base, vision=args.vision)
        model.config.max_slices = settings.get("max_slices", model.config.max_slices)
        name = settings.get("recipe", "phantom")

        def source(numbers: Any) -> Any:
            recipe = build_recipe(name, args.data, model.config.image_size, settings, kspace=stage.NEEDS_KSPACE, numbers=numbers)
            mixture = Mixture({recipe: 1.0}, seed=seed, reuse=settings.get("reuse", 1), tellings=settings.get("tellings", 1))
            return stage.Source(mixture, tokenizer, model)

        values = {**stage.DEFAULTS, **{k: v for k, v in settings.items() if k in types}}
        fit_config = FitConfig(learning_rate=rates | {k: v for k, v in stage.LEARNING_RATE.items() if k not in rates}, **values)
        training, validation = source(TRAINING_MAPS), source(CHOOSING_MAPS) if name == "synthetic" else None
        extra = {k: settings[k] for k in ("mask_share", "word_share", "image_share", "tellings") if k in settings}
        if extra and not stage.NEEDS_KSPACE:
            raise ValueError(f"stage {args.stage} has no {' or '.join(extra)}; only pretrain and instruct have")
        if fit_config.batch_size % settings.get("tellings", 1):
            raise ValueError(f"expected a batch_size that tellings={settings['tellings']} divides, got {fit_config.batch_size}")
        objective = stage.build(model, fit_config.steps, **extra)
        fit(
            objective,
            training,
            fit_config,
            args.out,
            tokenizer=tokenizer,
            init=args.init,
            validation=validation,
            provenance=provenance(args, stage, settings | {RATE + k: v for k, v in rates.items()}, source_of_weights),
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def provenance(args: Any, stage: Any, settings: dict[str, Any], before: Path | None) -> dict[str, Any]:
    """What made these weights: commit, stage, recipe, settings, licences of the data, and the stages before."""
    import json

    from data_recipes import RECIPES

    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    ).stdout.strip()
    recipe = RECIPES[settings.get("recipe", "phantom")]
    told = {"stage": args.stage, "preset": args.preset, "commit": commit or "unknown", "recipe": recipe.name,
            "data_licence": recipe.licence, "data_citation": recipe.citation, "settings": settings}
    earlier = []
    if before is not None and (before / "provenance.json").exists():
        last = json.loads((before / "provenance.json").read_text())
        resumed = args.out.resolve() in before.resolve().parents
        earlier = last.get("before", []) + ([] if resumed else [{k: v for k, v in last.items() if k != "before"}])
    return {**told, "before": earlier}


if __name__ == "__main__":
    sys.exit(main())
