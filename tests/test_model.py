"""The model keeps its promises: exact saving, caching, padding, and the same queries however text comes about."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file

from omnimri.checkpoint import load_model, load_weights
from omnimri.conversation import Message, card, query_messages, render
from omnimri.example import LESION_CLASS, prepare, segment_classes
from omnimri.model.config import preset
from omnimri.model.omnimri import OmniMRI
from omnimri.physics import fft2c, gaussian_coils, ifft2c, line_mask
from omnimri.tasks.segment import UNKNOWN, Segment, SegmentTarget, root_weights


def seen_by(model, records):
    images = torch.stack([r.images for r in records]).clamp(0, 1)
    positions = torch.stack([r.positions_mm for r in records])
    patches = model.encode(images, positions, torch.zeros(len(records), dtype=torch.long))
    return model.look(patches, torch.arange(images.shape[1]).expand(len(records), -1))


def prompts(model, tokenizer, questions):
    per = 4 * model.config.tokens_per_slice
    rows = [render([Message("user", q)], tokenizer, study=card("axial"), num_image_tokens=per, answer_prefix="").ids for q in questions]
    longest = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    return ids, mask


def test_parts_are_the_prefixes(model):
    assert {n.split(".")[0] for n, _ in model.named_parameters()} == {"vision", "projector", "language", "heads"}


def test_saved_and_loaded_are_equal_and_keys_are_the_state_dicts(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = OmniMRI.from_pretrained(str(tmp_path))
    own = model.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in again.state_dict().items())
    assert set(load_file(tmp_path / "model.safetensors")) == set(own) - set(model._tied_weights_keys)


def test_auto_classes(model, tmp_path):
    from transformers import AutoModel

    model.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(str(tmp_path))).__name__ == "OmniMRI"


def test_foreign_weights_are_an_error(model, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text("{}")
    save_file({"something.else": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="none matches"):
        load_weights(model, tmp_path)


def test_a_damaged_checkpoint_is_refused(checkpoint, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(ValueError, match="damaged"):
        load_model(copy)
    with pytest.raises(ValueError, match="found none"):
        load_model(tmp_path / "nowhere")


@torch.inference_mode()
def test_cached_equals_uncached_and_padded_equals_unpadded(model, tokenizer, phantom):
    records = [phantom.record(0, i) for i in range(2)]
    visual = seen_by(model, records)
    ids, mask = prompts(model, tokenizer, ["Write a report.", "What sequence and plane is this, please tell me?"])
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id,
                "return_dict_in_generate": True, "output_logits": True}
    batch = model.generate(ids, attention_mask=mask, visual=visual, **settings)
    slow = model.generate(ids, attention_mask=mask, visual=visual, use_cache=False, **settings)
    assert torch.equal(batch.sequences, slow.sequences)
    assert max(float((a - b).abs().max()) for a, b in zip(batch.logits, slow.logits, strict=True)) < 1e-4
    for k in range(2):
        row = ids[k : k + 1, int((1 - mask[k]).sum()) :]
        alone = model.generate(row, attention_mask=torch.ones_like(row), visual=visual[k : k + 1], **settings)
        assert torch.equal(alone.sequences[0, row.shape[1] :], batch.sequences[k, ids.shape[1] :])
        assert max(float((a[0] - b[k]).abs().max()) for a, b in zip(alone.logits, batch.logits, strict=True)) < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("beams", [1, 3])
def test_generating_and_teacher_forcing_give_the_same_queries(model, tokenizer, phantom, beams):
    """States while tokens are generated (fed back one by one) equal the states of one pass over the finished text."""
    visual = seen_by(model, [phantom.record(0, 0)])
    ids, mask = prompts(model, tokenizer, ["Segment the left thalamus."])
    out = model.generate(ids, attention_mask=mask, visual=visual, max_new_tokens=10, do_sample=False, num_beams=beams,
                         eos_token_id=None, pad_token_id=tokenizer.pad_token_id)
    written = out[0, ids.shape[1] :]
    forced = model(input_ids=out, visual=visual).hidden_states[0][0, ids.shape[1] :]
    step = model(input_ids=ids, visual=visual, use_cache=True)
    states = []
    for token in written:
        step = model(input_ids=token.view(1, 1), past_key_values=step.past_key_values, use_cache=True,
                     attention_mask=torch.ones(1, step.past_key_values.get_seq_length() + 1, dtype=torch.long))
        states.append(step.hidden_states[0][0, -1])
    a, b = (model.heads["segment"].queries(x) for x in (forced, torch.stack(states)))
    assert float((a - b).abs().max()) < 1e-4


def test_streaming_writes_what_generate_returns(model, tokenizer, phantom):
    from threading import Thread

    from transformers import TextIteratorStreamer

    with torch.inference_mode():
        visual = seen_by(model, [phantom.record(0, 0)])
    ids, mask = prompts(model, tokenizer, ["Write a report."])
    settings = {"attention_mask": mask, "visual": visual, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None,
                "pad_token_id": tokenizer.pad_token_id}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=False)
    thread = Thread(target=model.generate, args=(ids,), kwargs={**settings, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(model.generate(ids, **settings)[0, ids.shape[1] :])


def test_lora_starts_as_identity_and_merges_exactly(model, tokenizer, phantom):
    ids = torch.randint(30, 500, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model(input_ids=ids).logits
    model.add_lora(4)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, before)
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.05)
    with torch.inference_mode():
        changed = model(input_ids=ids).logits
        assert float((changed - before).abs().max()) > 0.01
        model.merge_lora()
        assert torch.allclose(model(input_ids=ids).logits, changed, atol=1e-4)
    assert not any("lora" in n for n, _ in model.named_parameters())


@torch.inference_mode()
def test_full_sampling_returns_exactly_at_any_size(model):
    g = torch.Generator().manual_seed(0)
    for h, w, coils in ((40, 56, 3), (33, 48, 1)):
        maps = gaussian_coils(coils, h, w, g)
        image = torch.complex(torch.rand(h, w, generator=g), torch.rand(h, w, generator=g))
        kspace = fft2c(image * maps)[None]
        head = model.heads["reconstruct"]
        for cascade in head.cascades:
            torch.nn.init.normal_(cascade.last.weight, std=0.1)
        everything, some = torch.ones(1, 1, w, dtype=torch.bool), line_mask(w, 4.0, g)[None, None]
        for given in (maps[None], None):
            said = head(kspace, everything, given)
            assert float((said.image[0].abs() - image.abs()).abs().max()) < 1e-5
            assert float(said.spread.abs().max()) == 0
            under = head(kspace * some[:, None], some, given)
            assert float((under.image[0].abs() - image.abs()).abs().max()) > 1e-3
            assert float(under.spread.min()) > 0
    assert torch.allclose(ifft2c(fft2c(image)), image, atol=1e-6)


def test_extra_blocks_begin_as_identity(model):
    """A pixel decoder with more blocks sees what the one it begins with sees."""
    config = deepcopy(model.config)
    config.extra_blocks = [0, 1, 0, 2, 1]
    deeper = OmniMRI(config).eval()
    deeper.load_state_dict(model.state_dict(), strict=False)
    images, positions = torch.rand(1, 2, 3, config.image_size, config.image_size), torch.tensor([[0.0, 4.0]])
    with torch.no_grad():
        patches = model.encode(images, positions, torch.zeros(1, dtype=torch.long))
        torch.testing.assert_close(deeper.pixels(images, patches, positions).fine, model.pixels(images, patches, positions).fine)
    config.extra_blocks = [1]
    with pytest.raises(ValueError, match="extra_blocks at 5 strides"):
        OmniMRI(config)


def test_a_small_lesion_weighs_the_same_beside_a_large_one():
    """Missing it costs what it costs alone."""
    small, large = torch.zeros(1, 48, 48, dtype=torch.long), torch.zeros(1, 48, 48, dtype=torch.long)
    small[0, 2:6, 2:6] = 2
    large[0, 20:44, 20:44] = 1
    weights = root_weights(small + large, UNKNOWN)
    torch.testing.assert_close(weights[small > 0].sum(), root_weights(small, UNKNOWN)[small > 0].sum())
    assert float(weights[small > 0].sum()) == pytest.approx(4.0)
    target = SegmentTarget(torch.zeros_like(small), torch.where(large > 0, UNKNOWN, small))
    assert target.lesion.unique().tolist() == [0, 1, UNKNOWN]
    seen = torch.where(small > 0, 8.0, -8.0)
    missed = torch.full((1, 48, 48), -8.0)
    loss = [float(Segment().loss((torch.zeros(1, 3, 48, 48), x), target)["lesion"][0]) for x in (seen, missed)]
    assert loss[0] < 0.1 < 30 < loss[1]


def test_prepare_gives_every_segment_its_class(tokenizer, phantom):
    chat = (Message("user", "Segment <segment> the <|im_end|> left thalamus."),
            Message("assistant", "The left thalamus <segment> measures <ml> ml. There is a <size> lesion in the right putamen <segment>."))
    example = prepare(phantom.record(0, 0), chat, tokenizer, max_slices=8, tokens_per_slice=16)
    token = tokenizer.convert_tokens_to_ids("<segment>")
    where = torch.nonzero(example.input_ids == token).flatten()
    assert len(where) == 2, "text of a person cannot write task tokens"
    from omnimri.anatomy import CLASS_OF_NAME

    assert example.segment_class[where].tolist() == [CLASS_OF_NAME["left thalamus"], LESION_CLASS]
    assert int((example.input_ids == tokenizer.convert_tokens_to_ids("<|im_end|>")).sum()) == 2
    query = render(query_messages(), tokenizer)
    classes = [k for k in segment_classes(query, tokenizer) if k]
    assert classes == list(range(1, LESION_CLASS + 1))


def test_answers_learn_no_digits(tokenizer, phantom):
    """Targets hold slots: no digit outside names stands in anything the model is taught to say."""
    import re

    for i in range(150):
        for chat in phantom.record(9, i).conversations:
            for message in chat:
                if message.role == "assistant":
                    assert not re.search(r"\d", re.sub(r"T1|T2|3rd|4th", "", message.text)), message.text


@pytest.mark.parametrize("name", ["tiny", "small", "base", "large"])
def test_presets_are_whole(name, tokenizer):
    config = preset(name, vocab_size=len(tokenizer))
    with torch.device("meta"):
        model = OmniMRI(config)
    assert config.tokens_per_slice <= 16
    assert config.max_slices * config.tokens_per_slice <= 512
    assert json.loads(config.to_json_string())["model_type"] == "omnimri"
    assert sum(p.numel() for p in model.parameters()) > 1e6
