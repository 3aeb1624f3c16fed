"""An HTML page of records as the model sees them: slices, masks, boxes, k-space, parameters, and text by token with its loss."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from omnimri.conversation import IGNORE, card, render
from omnimri.example import Record, normalise
from omnimri.physics import ifft2c

from .recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STYLE = """body{font:14px sans-serif;max-width:1500px;margin:auto} .t span{white-space:pre-wrap} .l{background:#cdeccd}
.s{font-weight:bold;color:#a0208f} .t{font:12px monospace;border-left:3px solid #ccc;padding-left:8px;margin:6px 0} img{max-width:100%}"""


def show(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, seed: int, count: int, out: Path) -> None:
    """Write `index.html` and one PNG a record. Text that is learnt is green, tokens that drive something are bold."""
    out.mkdir(parents=True, exist_ok=True)
    legend = "Red: lesions; yellow: lesions that this image cannot show, which teach nothing. Green text is learnt."
    parts = [f"<!doctype html><meta charset=utf-8><title>{recipe.name}</title><style>{STYLE}</style>",
             f"<p>Research use only. Not a medical device. {legend}</p>"]
    for i in range(count):
        record = recipe.record(seed, i)
        draw(record, out / f"{i}.png")
        known = ", ".join(f"{k} {v}" for k, v in record.parameters.items())
        spacing = " x ".join(f"{s:.2f}" for s in record.spacing_mm)
        told = zip(record.lesion_kinds or (), record.lesion_places or (), record.lesion_lobes or (), strict=True)
        lesions = "; ".join(", ".join(filter(None, x)) for x in told)
        parts.append(f"<h3>{i}: {record.plane} {record.sequence} {record.technique}</h3><p>{known or 'no parameters'}; {spacing} mm; "
                     f"signal: {'; '.join(record.signal) or 'not measured'}<br>made: {lesions or 'normal'}</p><img src={i}.png>")
        study = card(record.plane, record.sequence, record.lesion_places, record.signal)
        for k, chat in enumerate(record.conversations):
            rendered = render(chat, tokenizer, study=study if k == 0 else "")
            spans = []
            for token, label in zip(rendered.ids, rendered.labels, strict=True):
                said = tokenizer.decode([token])
                mark = " ".join(["l"] * (label != IGNORE) + ["s"] * (said.startswith("<") and said.endswith(">")))
                spans.append(f"<span class='{mark}'>{html.escape(said)}</span>")
            parts.append(f"<div class=t>{''.join(spans)}</div>")
    (out / "index.html").write_text("\n".join(parts), encoding="utf-8")


def draw(record: Record, path: Path) -> None:
    """One PNG: slices, the same with structures, lesions and boxes, and the k-space with its zero-filled image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    assert record.labels is not None
    assert record.lesions is not None
    images = normalise(record.images)[:, 1]
    kspace = bool(record.kspace)
    figure, axes = pyplot.subplots(2, len(images) + kspace, figsize=(2.4 * (len(images) + kspace), 4.8), squeeze=False)
    for k, image in enumerate(images):
        for row in axes[:, k]:
            row.imshow(image, cmap="gray", vmin=0, vmax=1.2)
        axes[1, k].imshow(record.labels[k], cmap="nipy_spectral", vmin=0, vmax=33, alpha=0.45 * (record.labels[k] > 0).float())
        lesions = record.lesions[k]
        if bool((lesions == 255).any()):
            axes[1, k].contour(lesions == 255, [0.5], colors="yellow", linewidths=0.7)
        for rank in set(lesions[(lesions > 0) & (lesions < 255)].tolist()):
            at = torch.nonzero(lesions == rank)
            (y, x), (bottom, right) = at.amin(0).tolist(), at.amax(0).tolist()
            axes[1, k].contour(lesions == rank, [0.5], colors="red", linewidths=0.8)
            axes[1, k].add_patch(Rectangle((x - 1, y - 1), right - x + 2, bottom - y + 2, fill=False, edgecolor="white", linewidth=0.6))
    if kspace:
        axes[0, -1].imshow(record.kspace["kspace"].abs().square().sum(0).sqrt().clamp(min=1e-6).log(), cmap="gray")
        axes[1, -1].imshow((ifft2c(record.kspace["kspace"]) * record.kspace["coils"].conj()).sum(0).abs(), cmap="gray")
        axes[0, -1].set_title(f"{len(record.kspace['coils'])} coils", fontsize=8)
    for axis in axes.flat:
        axis.axis("off")
    figure.subplots_adjust(0, 0, 1, 0.95, 0.02, 0.02)
    figure.savefig(path, dpi=60)
    pyplot.close(figure)
