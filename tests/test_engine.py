"""The training loop: bit-identical resume, survival of kills and damage, honest globs, exact accumulation."""

from __future__ import annotations

import copy
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_recipes import Mixture, Phantom
from omnimri.checkpoint import load_model, newest_good
from omnimri.model.omnimri import OmniMRI
from stages import STAGES
from stages.__main__ import main
from stages.engine import FitConfig, batch_at, fit, parameter_groups
from stages.grounded import GroundedDialogue

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


def run(stage_name, config, tokenizer, out, *, workers, steps=4, shares=None, **changes):
    stage = importlib.import_module(STAGES[stage_name])
    torch.manual_seed(0)
    model = OmniMRI(copy.deepcopy(config))
    recipe = Phantom(image_size=64, num_slices=3, kspace_size=96 * stage.NEEDS_KSPACE)
    source = stage.Source(Mixture({recipe: 1.0}, seed=5), tokenizer, model)
    settings = FitConfig(steps=steps, learning_rate=stage.LEARNING_RATE, batch_size=2, warmup=1, save_every=2, keep=3,
                         validate_every=100, validate_batches=1, workers=workers, seed=5)
    extra = {} if shares is None else dict(zip(("mask_share", "word_share"), shares, strict=True))
    return fit(stage.build(model, steps, **extra), source, replace(settings, **changes), out, tokenizer=tokenizer)


@pytest.mark.parametrize("stage", list(STAGES))
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_bit_identical(stage, workers, config, tokenizer, tmp_path, capfd):
    """Stopping after two of four steps and going on, with the other number of workers, changes no bit."""
    precision = "bf16" if workers else "auto"
    run(stage, config, tokenizer, tmp_path / "whole", workers=workers, precision=precision)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000004")
    run(stage, config, tokenizer, tmp_path / "cut", workers=2 - workers, precision=precision)
    assert "resumed at step 2" in capfd.readouterr().out
    for name in ("model", "optimizer", "objective"):
        a, b = (load_file(tmp_path / k / "checkpoints" / "step-000004" / f"{name}.safetensors") for k in ("whole", "cut"))
        assert set(a) == set(b)
        assert all(torch.equal(v, b[k]) for k, v in a.items()), name
    before = load_file(tmp_path / "whole" / "checkpoints" / "step-000002" / "model.safetensors")
    after = load_file(tmp_path / "whole" / "checkpoints" / "step-000004" / "model.safetensors")
    assert any(not torch.equal(v, after[k]) for k, v in before.items())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_training_resumes_bit_identically_and_agrees(config, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("stages.grounded.GroundedDialogue.dense_parts", lambda self: [self.model.heads["pixels"].mix[0]])  # seconds
    monkeypatch.setattr("stages.grounded.GroundedDialogue.word_parts", lambda self: [self.model.language.model.layers[0].mlp])
    shares = (0.8, 0.05)
    last = run("pretrain", config, tokenizer, tmp_path / "whole", workers=0, compile=True, shares=shares)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000004")
    run("pretrain", config, tokenizer, tmp_path / "cut", workers=0, compile=True, shares=shares)
    a, b = (load_file(tmp_path / k / "checkpoints" / "step-000004" / "model.safetensors") for k in ("whole", "cut"))
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    plain = run("pretrain", config, tokenizer, tmp_path / "plain", workers=0, shares=shares)
    assert last["segment"] == pytest.approx(plain["segment"], rel=0.02)


@pytest.mark.parametrize(("hardware", "precision", "kept"), [
    (True, "auto", "bf16"), (False, "auto", "no"), (False, "bf16", "bf16"), (True, "no", "no")])
def test_bf16_is_used_where_hardware_multiplies_it_or_it_is_asked_for(hardware, precision, kept, config, tokenizer, tmp_path, monkeypatch):
    seen = set()
    forward = GroundedDialogue.forward

    def watched(self, batch):
        seen.add(torch.is_autocast_enabled("cpu"))
        return forward(self, batch)

    monkeypatch.setattr("stages.engine.fast_bf16", lambda _: hardware)
    monkeypatch.setattr(GroundedDialogue, "forward", watched)
    run("pretrain", config, tokenizer, tmp_path, workers=0, steps=1, precision=precision, shares=(0.8, 0.05))
    assert seen == {kept == "bf16"}


def test_echoed_batches_resume_bit_identically_in_the_middle(config, tokenizer, tmp_path):
    """Steps 0 and 1 see one batch, 2 and 3 the next; the run that is cut after three steps goes on with the same batch."""
    for out in ("whole", "cut"):
        run("pretrain", config, tokenizer, tmp_path / out, workers=0, echo=2, save_every=3, steps=4)
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000004")
    run("pretrain", config, tokenizer, tmp_path / "cut", workers=2, echo=2, save_every=3, steps=4)
    run("pretrain", config, tokenizer, tmp_path / "plain", workers=0, save_every=3, steps=4)
    a, b, c = (load_file(tmp_path / k / "checkpoints" / "step-000004" / "model.safetensors") for k in ("whole", "cut", "plain"))
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert any(not torch.equal(v, c[k]) for k, v in a.items())


def test_a_gradient_that_overflowed_changes_nothing(config, tokenizer, tmp_path, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
    with pytest.warns(UserWarning, match="overflowed"):
        run("align", config, tokenizer, tmp_path, workers=0)
    with pytest.raises(FloatingPointError, match="in a row"), pytest.warns(UserWarning, match="overflowed"):
        run("align", config, tokenizer, tmp_path / "long", workers=0, steps=12)
    a, b = (load_file(tmp_path / "checkpoints" / f"step-00000{k}" / "model.safetensors") for k in (2, 4))
    assert all(torch.equal(v, b[k]) for k, v in a.items() if "running" not in k and "batches" not in k)


def test_a_language_model_of_another_size_begins_anew_on_the_rest(checkpoint, tmp_path):
    sizes = ("text_layers=2", "vocab_size=700", "num_slices=2", "batch_size=1", "validate_batches=1")
    order = ["pretrain", "--init", str(checkpoint), "--out", str(tmp_path), *(x for s in sizes for x in ("--set", s))]
    assert main([*order, "--set", "steps=1"]) == 0
    model, tokenizer, _ = load_model(newest_good(tmp_path))
    assert (model.config.text_config.num_hidden_layers, len(tokenizer)) == (2, model.config.text_config.vocab_size)
    assert len(tokenizer) <= 720
    before = load_file(checkpoint / "model.safetensors")
    kept = {k: v for k, v in model.state_dict().items() if k.startswith("heads.contrast") and "running" not in k and "batches" not in k}
    assert kept
    assert all(torch.equal(v, before[k]) for k, v in kept.items())
    assert main([*order, "--set", "steps=2"]) == 0, "resumed, with what was built"


def test_8_bit_optimizer_resumes_bit_identically(config, tokenizer, tmp_path):
    run("align", config, tokenizer, tmp_path / "whole", workers=0, optimizer="adamw8bit")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000004")
    run("align", config, tokenizer, tmp_path / "cut", workers=0, optimizer="adamw8bit")
    run("align", config, tokenizer, tmp_path / "plain", workers=0)
    found = {k: tmp_path / k / "checkpoints" / "step-000004" for k in ("whole", "cut", "plain")}
    for name in ("model", "optimizer"):
        a, b = (load_file(found[k] / f"{name}.safetensors") for k in ("whole", "cut"))
        assert set(a) == set(b)
        assert all(torch.equal(v, b[k]) for k, v in a.items()), name
    sizes = {k: (found[k] / "optimizer.safetensors").stat().st_size for k in ("whole", "plain")}
    assert sizes["whole"] < 0.5 * sizes["plain"]


def test_deepspeed_shards_resumes_and_agrees_with_ddp(checkpoint, tmp_path):
    """Two processes: ZeRO-2 resumes bit-identically, each process keeps half of the state, and the weights are those of DDP."""

    def train(out, *settings, stage="vision"):
        shared = ("num_slices=2", "batch_size=2", "steps=3", "save_every=2", "keep=3", "warmup=1",
                  "precision=no", "validate_every=100", "validate_batches=1")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "stages", stage, "--out",
                   str(out), "--init", str(checkpoint), *(x for s in (*shared, *settings) for x in ("--set", s))]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout, out / "checkpoints" / "step-000003"

    _, whole = train(tmp_path / "whole", "zero_stage=2")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000003")
    told, cut = train(tmp_path / "cut", "zero_stage=2")
    assert "resumed at step 2" in told
    for name in ("model", "optimizer-0", "optimizer-1"):
        a, b = (load_file(k / f"{name}.safetensors") for k in (whole, cut))
        assert all(torch.equal(v, b[k]) for k, v in a.items()), name
    _, plain = train(tmp_path / "plain")
    a, b = (load_file(k / "model.safetensors") for k in (whole, plain))
    assert all(torch.allclose(v, b[k], atol=1e-5) for k, v in a.items())
    half = [sum(v.numel() for k, v in load_file(whole / f"optimizer-{r}.safetensors").items() if k.endswith("exp_avg")) for r in (0, 1)]
    full = sum(v.numel() for k, v in load_file(plain / "optimizer.safetensors").items() if k.endswith("exp_avg"))
    assert max(half) < 0.6 * full
    # The stage whose steps use different parts of the model from one to the next.
    train(tmp_path / "words", "word_share=0.5", "mask_share=0.2", stage="pretrain")


@pytest.mark.parametrize("harm", ["truncated", "flipped"])
def test_a_damaged_newest_checkpoint_is_passed_over(harm, config, tokenizer, tmp_path, capfd):
    run("align", config, tokenizer, tmp_path, workers=0)
    newest = tmp_path / "checkpoints" / "step-000004" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    if harm == "truncated":
        data = data[: len(data) // 2]
    else:
        data[len(data) // 3] ^= 4
    newest.write_bytes(bytes(data))
    with pytest.warns(UserWarning, match="step-000004 is not used"):
        assert newest_good(tmp_path).name == "step-000002"
    with pytest.warns(UserWarning, match="damaged"):
        run("align", config, tokenizer, tmp_path, workers=0)
    assert "resumed at step 2" in capfd.readouterr().out
    assert newest_good(tmp_path).name == "step-000004"


def test_a_kill_loses_at_most_save_every_steps(checkpoint, tmp_path):
    command = [sys.executable, "-m", "stages", "vision", "--out", str(tmp_path / "run"), "--init", str(checkpoint), "--set", "batch_size=1",
               "--set", "num_slices=2", "--set", "save_every=4", "--set", "steps=4000", "--set", "validate_every=100000"]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ)
    checkpoints = tmp_path / "run" / "checkpoints"
    for _ in range(1200):
        if len(list(checkpoints.glob("step-*"))) >= 2:
            break
        time.sleep(0.1)
    time.sleep(0.37 * (os.getpid() % 7))
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = int(newest_good(tmp_path / "run").name.removeprefix("step-"))
    done = max(int(n) for n in re.findall(r"(\d+)/4000", (tmp_path / "log").read_text()))
    assert kept >= 4
    assert done - kept <= 4
    again = subprocess.run([*command[:-4], "--set", f"steps={kept + 2}", *command[-2:]], cwd=ROOT, capture_output=True, text=True,
                           env=os.environ, check=False)
    assert again.returncode == 0, again.stderr[-2000:]
    assert f"resumed at step {kept}" in again.stdout
    assert newest_good(tmp_path / "run").name == f"step-{kept + 2:06d}"


def test_globs_freeze_and_must_match(config):
    model = torch.nn.Module()
    model.model = OmniMRI(copy.deepcopy(config))
    settings = FitConfig(steps=1, learning_rate={"language.*": 1e-3, "heads.segment.*": 2e-3})
    groups = parameter_groups(model, settings)
    moving = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moving == {n for n, _ in model.named_parameters() if n.startswith(("model.language.", "model.heads.segment."))}
    assert {g["peak"] for g in groups} == {1e-3, 2e-3}
    with pytest.raises(ValueError, match=r"visoin"):
        parameter_groups(model, replace(settings, learning_rate={"visoin.*": 1.0}))


def test_accumulation_equals_one_large_batch(config, tokenizer, tmp_path):
    """Terms are normalised over the whole window: two micro-batches of two equal one batch of four."""
    run("pretrain", config, tokenizer, tmp_path / "a", workers=0, steps=1, batch_size=4, precision="no", warmup=1,
        shares=(0.0, 0.0))
    run("pretrain", config, tokenizer, tmp_path / "b", workers=0, steps=1, batch_size=2, accumulate=2, precision="no", warmup=1,
        shares=(0.0, 0.0))
    a, b = (load_file(tmp_path / k / "checkpoints" / "step-000001" / "optimizer.safetensors") for k in "ab")
    # Dice terms are per batch, and the swap of queries is drawn per batch: reconstruction is what must agree exactly.
    keys = [k for k in a if "heads.reconstruct" in k and k.endswith("exp_avg")]
    assert max(float(a[k].norm()) for k in keys) > 1e-6
    for k in keys:
        cosine = torch.nn.functional.cosine_similarity(a[k].flatten(), b[k].flatten(), dim=0)
        assert float(cosine) > 0.999 or float(a[k].norm()) < 1e-8, k


def test_batches_are_a_pure_function_of_the_step(config, tokenizer):
    stage = importlib.import_module(STAGES["instruct"])
    source = stage.Source(Mixture({Phantom(image_size=64, num_slices=3): 1.0}, seed=1), tokenizer, OmniMRI(copy.deepcopy(config)))
    settings = FitConfig(steps=9, learning_rate={}, batch_size=2)
    a, b = batch_at(source, settings, 7), batch_at(source, settings, 7)
    assert all(torch.equal(a[k], b[k]) for k in a)
    ranks = [batch_at(source, settings, 3, rank, 2)["images"] for rank in (0, 1)]
    assert not torch.equal(*ranks)


def test_words_of_studies_told_several_times_are_learnt_as_ever(config, tokenizer):
    """A study is looked at once for its tellings, and the terms are those of looking at it for each."""
    stage, model = importlib.import_module(STAGES["pretrain"]), OmniMRI(copy.deepcopy(config))
    source = stage.Source(Mixture({Phantom(image_size=64, num_slices=3): 1.0}, seed=1, tellings=2), tokenizer, model)
    batch = batch_at(source, FitConfig(steps=1, learning_rate={}, batch_size=4), 0)
    assert torch.equal(batch["images"][0], batch["images"][1])
    assert not torch.equal(batch["input_ids"][0], batch["input_ids"][1])
    looks, found = [], []
    model.vision.register_forward_hook(lambda *a: looks.append(len(a[1][0])))
    for tellings in (1, 2):
        torch.manual_seed(0)
        found.append(stage.build(model, 1, mask_share=0.0, word_share=0.999, image_share=0.0, tellings=tellings)(batch))
    assert looks[0] == 2 * looks[1]
    assert found[0].keys() == found[1].keys() >= {"text", "match", "sequence"}
    for name, term in found[0].items():
        assert torch.allclose(term.sum, found[1][name].sum, rtol=1e-4), name
        assert torch.equal(term.count, found[1][name].count)


def test_another_optimizers_state_is_refused(config, tokenizer, tmp_path):
    run("align", config, tokenizer, tmp_path, workers=0, steps=2)
    with pytest.raises(ValueError, match="goes on only so"):
        run("align", config, tokenizer, tmp_path, workers=0, optimizer="adamw8bit")


def test_bad_settings_are_told(tmp_path, capsys):
    assert main(["align", "--out", str(tmp_path / "x"), "--set", "stesp=3"]) == 2
    assert "expected KEY=VALUE" in capsys.readouterr().err
    assert main(["align", "--out", str(tmp_path / "x"), "--init", str(tmp_path / "none")]) == 2
    assert "found none" in capsys.readouterr().err
    assert main(["pretrain", "--out", str(tmp_path / "x"), "--set", "tellings=3", "--set", "batch_size=4"]) == 2
    assert "tellings=3 divides" in capsys.readouterr().err
    assert main(["align", "--preset", "huge", "--out", str(tmp_path / "x")]) == 2
    assert "unknown preset" in capsys.readouterr().err


def test_seconds_of_a_step_come_from_the_log_without_the_first_steps(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    from stages.speed import seconds_a_step

    with SummaryWriter(str(tmp_path)) as log:
        for step, time_s in ((0, 0), (10, 90), (20, 110), (30, 130)):
            log.add_scalar("samples_per_s", 1.0, step, walltime=1e6 + time_s)
    assert seconds_a_step(tmp_path) == pytest.approx(2.0)
    with SummaryWriter(str(tmp_path / "short")) as log:
        log.add_scalar("samples_per_s", 1.0, 10)
    with pytest.raises(ValueError, match="21 steps"):
        seconds_a_step(tmp_path / "short")
