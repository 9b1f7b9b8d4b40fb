"""What each method minimises: losses of logits, mixtures of images, and one function that adds them up.

Shapes: x images [B, 3, S, S] float32, normalised; z logits [n, K], with a reject class [n, K + 1]; y labels [B]
int64; lam the share of ID in a mixture, one number a step. Losses come back as one float32 a row [n].
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.models import Net
from trainers.recipes import Objective, Recipe

HIDDEN_LAYERS = 3  # where "hidden" mixes: the input, behind stage 1, behind stage 2

# --- losses, one a row -------------------------------------------------------------------------------------------


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-sum_k t_k log p_k of float logits [n, K] and targets [n, K] or [K] that sum to 1."""
    return -(target * logits.log_softmax(dim=1)).sum(dim=1)


def entropy(logits: Tensor) -> Tensor:
    """-sum_k p_k log p_k, from 0 to log K."""
    log_p = logits.log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


def energy(logits: Tensor) -> Tensor:
    """E = -logsumexp(z): low where the net is sure (Liu et al. 2020, eq. 4 with T = 1)."""
    return -logits.logsumexp(dim=1)


def base_target(logits: Tensor, target: str) -> Tensor:
    """What an outlier is called, as a distribution [K]: all classes alike, or the last one (reject)."""
    outputs = logits.shape[1]
    if target == "reject":
        return F.one_hot(torch.tensor(outputs - 1), outputs).to(logits)
    return torch.full((outputs,), 1 / outputs).to(logits)


def mixed_target(labels: Tensor, lam: float, logits: Tensor, target: str) -> Tensor:
    """lam e_y + (1 - lam) t [B, K], t as in ``base_target`` (MixOE eq. 2, OpenMix eq. 5)."""
    return lam * F.one_hot(labels, logits.shape[1]).to(logits) + (1 - lam) * base_target(logits, target)


def consistency(mixed: Tensor, target: Tensor, distance: str) -> Tensor:
    """Distance of the logits of mixed images from mixed logits: mse, centred (blind to a shift of a row) or kl."""
    if distance == "kl":
        return F.kl_div(mixed.log_softmax(dim=1), target.log_softmax(dim=1), log_target=True, reduction="none").sum(1)
    gap = mixed - target
    if distance == "centred":
        gap = gap - gap.mean(dim=1, keepdim=True)
    return gap.square().mean(dim=1)


# --- mixtures ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """One step's chances: ID share, cutmix box (top, bottom, left, right), layer of hidden mixing."""

    lam: float
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    layer: int = 0


def draw(objective: Objective, size: int, seed: int, step: int) -> Draw:
    """The chances of ``step``, which depend on (seed, step) only; ``size`` is the images' side in pixels.

    For cutmix the box is clipped to the image and lam becomes exactly the share of ID pixels that are left.
    """
    rng = np.random.default_rng([seed, 17, step])
    lam = float(rng.beta(*objective.beta))
    if objective.mixer == "hidden":
        return Draw(lam, layer=int(rng.integers(HIDDEN_LAYERS)))
    if objective.mixer != "cutmix":
        return Draw(lam)
    side = int(size * np.sqrt(1 - lam))
    row, column = rng.integers(size, size=2).tolist()
    top, left = max(row - side // 2, 0), max(column - side // 2, 0)
    bottom, right = min(row - side // 2 + side, size), min(column - side // 2 + side, size)
    return Draw(1 - (bottom - top) * (right - left) / size**2, (top, bottom, left, right))


def mix_images(inside: Tensor, outside: Tensor, objective: Objective, chance: Draw) -> Tensor:
    """Pairs of images mixed as ``objective`` says: a patch of the outlier in the ID image, or a weighted mean."""
    if objective.mixer == "cutmix":
        top, bottom, left, right = chance.box
        mixed = inside.clone()
        mixed[:, :, top:bottom, left:right] = outside[:, :, top:bottom, left:right]
        return mixed
    return chance.lam * inside + (1 - chance.lam) * outside


# --- one step ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outputs:
    """Float32 logits and features of the groups that an objective sends through the net; None where it does not."""

    inside: Tensor
    features: Tensor
    outside: Tensor | None = None
    outside_features: Tensor | None = None
    mixed: Tensor | None = None


def forward(net: Net, recipe: Recipe, inside: Tensor, outside: Tensor | None, chance: Draw) -> Outputs:
    """Send what the objective needs through ``net``: in one batch, or a batch a group (``forward_mode``)."""
    goal = recipe.objective
    if goal.mixer == "hidden" and outside is not None:
        trunk = net.mixed_features(inside, outside, chance.lam, chance.layer).float()
        logits = net.head(trunk).float()
        return Outputs(logits[: len(inside)], trunk[: len(inside)], mixed=logits[len(inside) :])
    groups = {"inside": inside}
    if outside is not None and goal.raw:
        groups["outside"] = outside
    if outside is not None and goal.mixed:
        groups["mixed"] = mix_images(inside, outside, goal, chance)
    if recipe.forward_mode == "joint":
        trunk = net.features(torch.cat(list(groups.values())))
        parts = trunk.split([len(group) for group in groups.values()])
    else:
        parts = tuple(net.features(group) for group in groups.values())
    features = {name: part.float() for name, part in zip(groups, parts, strict=True)}
    logits_of = {name: net.head(part).float() for name, part in features.items()}
    return Outputs(
        logits_of["inside"],
        features["inside"],
        logits_of.get("outside"),
        features.get("outside"),
        logits_of.get("mixed"),
    )


def losses(
    goal: Objective, out: Outputs, labels: Tensor, lam: float, smoothing: float = 0.0
) -> dict[str, list[Tensor]]:
    """The weighted terms by name; each is a list of rows [n], one entry for each group of images it looks at."""
    terms = {"ce": [goal.ce * F.cross_entropy(out.inside, labels, reduction="none", label_smoothing=smoothing)]}
    if out.outside is not None:
        if goal.expose:
            terms["expose"] = [goal.expose * soft_cross_entropy(out.outside, base_target(out.outside, goal.target))]
        if goal.entropy:
            terms["entropy"] = [-goal.entropy * entropy(out.outside)]
        if goal.energy:
            pulled, pushed = energy(out.inside) - goal.m_in, goal.m_out - energy(out.outside)
            terms["energy"] = [goal.energy * F.relu(gap).square() for gap in (pulled, pushed)]
        if goal.ring and out.outside_features is not None:
            short = F.relu(goal.xi - out.features.norm(dim=1)).square()
            terms["ring"] = [goal.ring * short, goal.ring * out.outside_features.square().sum(dim=1)]
    mixture = out.mixed
    if goal.mixer == "logit" and out.outside is not None:
        mixture = lam * out.inside + (1 - lam) * out.outside
    if goal.mix and mixture is not None:
        terms["mix"] = [goal.mix * soft_cross_entropy(mixture, mixed_target(labels, lam, mixture, goal.target))]
    if goal.consistency and out.mixed is not None and out.outside is not None:
        wanted = lam * out.inside + (1 - lam) * out.outside
        wanted = wanted.detach() if goal.detach_target else wanted
        terms["consistency"] = [goal.consistency * consistency(out.mixed, wanted, goal.distance)]
    return terms


def total(terms: dict[str, list[Tensor]], reduction: str, images: int) -> dict[str, Tensor]:
    """Each term as one number: a mean over each group's own rows, or a sum over ``images``, all of the batch."""
    if reduction == "whole-batch-mean":
        return {name: torch.stack([rows.sum() for rows in parts]).sum() / images for name, parts in terms.items()}
    return {name: torch.stack([rows.mean() for rows in parts]).sum() for name, parts in terms.items()}
