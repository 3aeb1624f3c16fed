"""How the sequence of an image is learnt to be read off the model's own masks: its head fitted, its thresholds chosen.

The head is small and looks at numbers alone (`omnimri.measure.signal_profile`), so that it can be fitted in minutes to what a trained
model makes of studies: masks that spill, fluid that is scarce.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from data_recipes.recipe import uniform
from data_recipes.variation import VENTRICLES, closed
from omnimri.anatomy import SEQUENCES, STRUCTURES, WHITE_CLASSES
from omnimri.examination import likely_sequences
from omnimri.example import Record
from omnimri.measure import signal_profile
from omnimri.model.omnimri import SequenceHead

SPOILT = 8
"""Profiles that a study gives besides the one of its own masks (`spoilt`)."""
EPOCHS, LEARNING_RATE, WEIGHT_DECAY, BATCH = 12, 3e-3, 0.05, 64
NOISE, DROPPED, SMOOTHING = 0.1, 0.1, 0.02
"""Of the standardised numbers: noise added, share set to their mean; and smoothing of the classes."""
LEAST_PRECISION, LEAST_PRECISION_AGENT = 0.8, 0.9
"""Smallest share of the held-out studies that get a sequence's name in which it is right; of T1w-Gd, which tells what was given."""
LEAST_NAMED, LEAST_NAMED_AGENT = 6, 30
"""Fewest held-out studies that a name's threshold may rest on; of T1w-Gd."""


class Studies(Dataset[Record]):
    """Studies of a recipe by `draw(index)`."""

    def __init__(self, draw: Callable[[int], Record], count: int) -> None:
        self.draw, self.count = draw, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        torch.set_num_threads(1)
        return self.draw(index)


def studies(draw: Callable[[int], Record], count: int) -> Iterator[Record]:
    """`count` of them, drawn in a process of its own."""
    return iter(DataLoader(Studies(draw, count), batch_size=None, num_workers=1))


def spoilt(image: Tensor, classes: Tensor, lesions: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A look at a study as one at a real scan may be, whose masks are worse and whose fluid is scarcer than those of simulated heads: fluid
    closed in, under masks that do not know it in half of the cases; blurred; some of its slices alone; masks shifted, ventricles that reach
    too far, with holes, or are missed in part, structures missed, lesions missed or too wide.

    Args:
        image: (S, H, W) intensities.
        classes: (S, H, W) structure classes.
        lesions: (S, H, W) bool.
    """

    def happens(share: float) -> bool:
        return uniform(g, 0, 1) < share

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    def wide(mask: Tensor, reach: int) -> Tensor:
        return F.max_pool2d(mask.float()[:, None], 2 * reach + 1, 1, reach)[:, 0] > 0

    image, known = closed(image, classes, g)
    classes, lesions = (known if happens(0.5) else classes).clone(), lesions.clone()
    if happens(0.5):
        line = torch.exp(-0.5 * (torch.arange(-2.0, 3.0) / uniform(g, 0.3, 1.0)) ** 2)
        line = line / line.sum()
        image = F.conv2d(F.conv2d(image[:, None], line.view(1, 1, 5, 1), padding=(2, 0)), line.view(1, 1, 1, 5), padding=(0, 2))[:, 0]
    if happens(0.5):
        number = whole(max(1, len(image) // 3), len(image))
        first = whole(0, len(image) - number)
        image, classes, lesions = (x[first : first + number] for x in (image, classes, lesions))
    if happens(0.2):
        classes = classes.roll((whole(-2, 2), whole(-2, 2)), (1, 2))
    ventricles = torch.isin(classes, torch.tensor(VENTRICLES, dtype=classes.dtype))
    if happens(0.25) and bool(ventricles.any()):
        more = wide(ventricles, whole(1, 3)) & (classes > 0) & ~ventricles & (torch.rand(classes.shape, generator=g) < uniform(g, 0.3, 1.7))
        classes = torch.where(more, classes[ventricles].mode().values, classes)
    if happens(0.12):
        missed = ventricles & (torch.rand(classes.shape, generator=g) < uniform(g, 0, 1))
        classes = classes.masked_fill(missed, WHITE_CLASSES[0])
    if happens(0.12):
        gone = torch.randint(1, len(STRUCTURES) + 1, (whole(1, 5),), generator=g).to(classes.dtype)
        classes = classes.masked_fill(torch.isin(classes, gone), 0)
    if happens(0.1):
        lesions = torch.zeros_like(lesions)
    elif happens(0.1):
        lesions = wide(lesions, whole(1, 2))
    return image, classes, lesions


def fit_head(head: SequenceHead, profiles: Tensor, classes: Tensor, *, seed: int = 0) -> None:
    """Begin each network of the head anew and fit it by cross-entropy over `anatomy.SEQUENCES`, on standardised profiles; the scale is
    folded into its first layer.

    Args:
        profiles: (N, PROFILE_SIZE).
        classes: (N,) long.
    """
    mean, scale = profiles.mean(0), profiles.std(0).clamp(min=0.05)
    standard = (profiles - mean) / scale
    steps = EPOCHS * max(1, len(standard) // BATCH)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        for member in head.members:
            first, *_ = layers = [m for m in member.modules() if isinstance(m, torch.nn.Linear)]
            for layer in layers:
                layer.reset_parameters()
            optimiser = torch.optim.AdamW(member.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps)
            member.train()
            for _ in range(steps):
                i = torch.randint(len(standard), (BATCH,))
                x = (standard[i] + NOISE * torch.randn(BATCH, standard.shape[1])) * (torch.rand(BATCH, standard.shape[1]) > DROPPED)
                loss = F.cross_entropy(member(x), classes[i], label_smoothing=SMOOTHING)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
            member.eval()
            with torch.no_grad():
                first.weight /= scale
                first.bias -= first.weight @ mean


def learn_sequence(model: Any, see: Callable[[Record], Any], records: Iterator[Record], *, seed: int) -> None:
    """Fit the model's head of sequences to what the model itself makes of studies of its training recipe.

    Args:
        see: A look at one, with `image`, `classes` and `sick`, (S, H, W) each (`stages.release.see`).
    """
    g = torch.Generator().manual_seed(seed)
    profiles, classes = [], []
    for record in records:
        with torch.inference_mode():
            look = see(record)
        own = look.image, look.classes, look.sick
        profiles += [signal_profile(image, labels, sick.long()) for image, labels, sick in (own, *(spoilt(*own, g) for _ in range(SPOILT)))]
        classes += [SEQUENCES.index(record.sequence)] * (1 + SPOILT)
    fit_head(model.heads["sequence"], torch.stack(profiles).clone(), torch.tensor(classes))


def sequence_thresholds(model: Any, told_of: list[tuple[str, Tensor]]) -> dict[str, Any]:
    """For each sequence the smallest probability from which on it may be named when read off the image, where there is one;
    and what was measured for it.

    Args:
        told_of: The true sequence of each held-out study, and the profile of the model's masks of it.
    """
    told: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    instead: list[tuple[float, float, bool]] = []
    likeliest = 0
    right = lambda said, true: said == true or (said, true) == ("T1w", "T1w-Gd")  # noqa: E731
    for true, profile in told_of:
        (said, share), *other = likely_sequences(model, profile)
        told[said].append((share, right(said, true)))
        instead += [(share, plain, right(name, true)) for name, plain in other]
        likeliest += told[said][-1][1]
    found: dict[str, dict[str, float]] = {}
    for sequence in sorted(told.keys() | ({"T1w"} if instead else set()), reverse=True):  # T1w-Gd before T1w, which is said in its stead
        if sequence == "T1w":
            told[sequence] += [(plain, ok) for share, plain, ok in instead if share < found.get("T1w-Gd", {}).get("threshold", 2.0)]
        named = sorted(told[sequence], reverse=True)
        agent = sequence == "T1w-Gd"
        least, fewest = (LEAST_PRECISION_AGENT, LEAST_NAMED_AGENT) if agent else (LEAST_PRECISION, LEAST_NAMED)
        for k in range(fewest, len(named) + 1):
            good = sum(ok for _, ok in named[:k])
            # Studies of equal probability stand or fall together.
            if good >= least * k and (k == len(named) or named[k][0] < named[k - 1][0]) and sequence != "other":
                found[sequence] = {"threshold": named[k - 1][0], "named": k, "right": good}
    return {"thresholds": found, "studies": len(told_of), "right_without_threshold": likeliest,
            "named": sum(f["named"] for f in found.values()), "named_right": sum(f["right"] for f in found.values())}
