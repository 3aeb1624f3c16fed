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

from data_recipes.variation import closed
from omnimri.anatomy import SEQUENCES
from omnimri.examination import likely_sequences
from omnimri.example import Record
from omnimri.model.omnimri import SequenceHead

CLOSED_SHARE = 0.5
"""Share of the studies whose fluid is closed in (`data_recipes.variation.closed`)."""
PARTS = 3
"""Profiles of a part of its slices that a study gives besides that of all."""
EPOCHS, LEARNING_RATE, WEIGHT_DECAY, BATCH = 40, 3e-3, 0.05, 64
NOISE, DROPPED, SMOOTHING = 0.1, 0.1, 0.02
"""Of the standardised numbers: noise added, share set to their mean; and smoothing of the classes."""
LEAST_PRECISION, LEAST_PRECISION_AGENT = 0.8, 0.9
"""Smallest share of the held-out studies that get a sequence's name in which it is right; of T1w-Gd, which tells what was given."""
LEAST_NAMED = 6
"""Fewest held-out studies that a name's threshold may rest on."""


class Studies(Dataset[Record]):
    """Studies of a recipe by `draw(index)`, some with their fluid closed in."""

    def __init__(self, draw: Callable[[int], Record], count: int, seed: int) -> None:
        self.draw, self.count, self.seed = draw, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        torch.set_num_threads(1)
        record, g = self.draw(index), torch.Generator().manual_seed(1_000_003 * self.seed + index)
        return closed(record, g) if float(torch.rand((), generator=g)) < CLOSED_SHARE else record


def studies(draw: Callable[[int], Record], count: int, *, seed: int) -> Iterator[Record]:
    """`count` of them, drawn in a process of its own."""
    return iter(DataLoader(Studies(draw, count, seed), batch_size=None, num_workers=1))


def fit_head(head: SequenceHead, profiles: Tensor, classes: Tensor, *, seed: int = 0) -> None:
    """Begin the head anew and fit it by cross-entropy over `anatomy.SEQUENCES`, on standardised profiles; the scale is folded into its
    first layer.

    Args:
        profiles: (N, PROFILE_SIZE).
        classes: (N,) long.
    """
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in (m for m in head.modules() if isinstance(m, torch.nn.Linear)):
            layer.reset_parameters()
        mean, scale = profiles.mean(0), profiles.std(0).clamp(min=0.05)
        x_all = (profiles - mean) / scale
        optimiser = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        steps = EPOCHS * max(1, len(x_all) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps)
        head.train()
        for _ in range(steps):
            i = torch.randint(len(x_all), (BATCH,), generator=g)
            x = x_all[i] + NOISE * torch.randn(BATCH, x_all.shape[1], generator=g)
            x = x * (torch.rand(x.shape, generator=g) > DROPPED)
            loss = F.cross_entropy(head(x), classes[i], label_smoothing=SMOOTHING)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        head.eval()
    first = head.layers[0]
    with torch.no_grad():
        first.weight /= scale
        first.bias -= first.weight @ mean


def parts_of(look: Any, g: torch.Generator) -> list[Tensor]:
    """Profiles of a look: of all of its slices, and of some in a row."""
    found, slices = [look.profile()], len(look.image)
    for _ in range(PARTS):
        number = int(torch.randint(max(1, slices // 3), slices + 1, (), generator=g))
        first = int(torch.randint(slices - number + 1, (), generator=g))
        found.append(look.profile(slice(first, first + number)))
    return found


def learn_sequence(model: Any, see: Callable[[Record], Any], draw: Callable[[int], Record], count: int, *, seed: int) -> None:
    """Fit the model's head of sequences to what the model itself makes of `count` studies of its training recipe."""
    g = torch.Generator().manual_seed(seed)
    profiles, classes = [], []
    for record in studies(draw, count, seed=seed):
        with torch.inference_mode():
            own = parts_of(see(record), g)
        profiles += own
        classes += [SEQUENCES.index(record.sequence)] * len(own)
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
        least = LEAST_PRECISION_AGENT if sequence == "T1w-Gd" else LEAST_PRECISION
        for k in range(LEAST_NAMED, len(named) + 1):
            good = sum(ok for _, ok in named[:k])
            # Studies of equal probability stand or fall together.
            if good >= least * k and (k == len(named) or named[k][0] < named[k - 1][0]) and sequence != "other":
                found[sequence] = {"threshold": named[k - 1][0], "named": k, "right": good}
    return {"thresholds": found, "studies": len(told_of), "right_without_threshold": likeliest,
            "named": sum(f["named"] for f in found.values()), "named_right": sum(f["right"] for f in found.values())}
