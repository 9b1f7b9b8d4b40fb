"""Training recipes: what is minimised, and on which schedule. One preset a paper; torch-free.

    objective = mixer x target x weighted terms         recipe = objective + schedule + six switches

The switches are the choices in which the reference implementations of these methods silently disagree.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from miner.errors import UsageError

Mixer = Literal["none", "linear", "cutmix", "hidden", "logit"]
Views = Literal["crop-flip", "flip", "none"]


def check_finite(settings: object) -> None:
    """Raise UsageError for a field that is NaN or infinite: no comparison can be trusted to refuse it."""
    for name, value in vars(settings).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            raise UsageError(f"{name.replace('_', '-')} {value}: must be finite")


@dataclass(frozen=True)
class Objective:
    """L = ce CE(x) + expose SoftCE(o, t) - entropy H(o) + energy, ring, mix and consistency terms."""

    mixer: Mixer = "none"
    """How ID and outliers are mixed: none, linear (mixup), cutmix (a patch of the outlier in the ID image), hidden
    (linear, in the input or behind stage 1 or 2 of the net), logit (linear, of the logits)."""
    beta: tuple[float, float] = (1.0, 1.0)
    """The share of ID in a mixture follows Beta(A, B), one draw a step."""
    target: Literal["uniform", "reject"] = "uniform"
    """What outliers are called: uniform (all classes alike) or reject (one more class, the last)."""
    ce: float = 1.0
    """Weight of the ID cross-entropy."""
    expose: float = 0.0
    """Weight of the cross-entropy of raw outliers to the target (OE's lambda, the background class)."""
    entropy: float = 0.0
    """Weight of the outliers' entropy, which is maximised: bounded, unlike --expose."""
    energy: float = 0.0
    """Weight of the squared hinges on the energies E = -logsumexp(z)."""
    m_in: float = -12.0
    """ID energies above this margin are pulled down."""
    m_out: float = -4.0
    """Outlier energies below this margin are pushed up."""
    ring: float = 0.0
    """Weight of Objectosphere's ring: ID features longer than XI, outliers' features at zero."""
    xi: float = 50.0
    """Length that Objectosphere asks of ID features."""
    mix: float = 0.0
    """Weight of the cross-entropy of mixtures to the mixed target (MixOE's beta, OpenMix's lambda_o)."""
    consistency: float = 0.0
    """Weight of the distance between the logits of mixed images and the mixed logits (LogitMixOE)."""
    distance: Literal["mse", "centred", "kl"] = "mse"
    """That distance: mse, centred (mse after each row's mean is taken off) or kl."""
    detach_target: bool = False
    """No gradient through the mixed logits in the consistency term."""

    def __post_init__(self) -> None:
        check_finite(self)
        if not min(self.beta) > 0:
            raise UsageError(f"beta {self.beta}: both parameters must be above 0")
        weights = (self.ce, self.expose, self.entropy, self.energy, self.ring, self.mix, self.consistency)
        if min(weights) < 0:
            raise UsageError("weights of an objective's terms must be finite and at least 0")
        if self.mixer == "none" and (self.mix or self.consistency):
            raise UsageError("mix and consistency need a mixer: --mixer linear, cutmix, hidden or logit")
        if self.mixer == "hidden" and (self.raw or self.consistency):
            raise UsageError("mixer hidden: expose, entropy, energy, ring and consistency cannot be combined with it")

    @property
    def raw(self) -> bool:
        """Unmixed outliers go through the net."""
        return bool(
            self.expose or self.entropy or self.energy or self.ring or self.consistency or self.mixer == "logit"
        )

    @property
    def mixed(self) -> bool:
        """Mixed images go through the net."""
        return bool(self.consistency or (self.mix and self.mixer in ("linear", "cutmix", "hidden")))

    @property
    def outliers(self) -> bool:
        """The objective needs outliers at all."""
        return self.raw or self.mixed

    @property
    def reject(self) -> bool:
        """The net has one output more than there are classes."""
        return self.target == "reject"


@dataclass(frozen=True)
class Recipe:
    """An objective, its schedule, and the six switches that change every result."""

    objective: Objective = field(default_factory=Objective)
    epochs: int = 8
    """Passes over the ID training set."""
    lr: float = 0.05
    """Peak learning rate."""
    lr_min: float = 0.0
    """Learning rate that the cosine ends at."""
    warmup: float = 0.0
    """Share of all steps in which the learning rate climbs from 0 to its peak."""
    milestones: tuple[int, ...] = ()
    """Finished epochs after which the learning rate is divided by 10; without any it follows a cosine."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """sgd (momentum 0.9) or adam."""
    nesterov: bool = True
    """Nesterov's momentum, with sgd."""
    weight_decay: float = 5e-4
    """L2 penalty on all parameters, BatchNorm's and biases too."""
    label_smoothing: float = 0.0
    """Probability spread evenly over all classes; above zero it blurs the confidence that scores rely on."""
    forward_mode: Literal["joint", "separate"] = "joint"
    """joint: ID, outliers and mixtures share one forward and its BatchNorm statistics; separate: one each."""
    reduction: Literal["per-group-mean", "whole-batch-mean"] = "per-group-mean"
    """per-group-mean: each term is a mean over its own images; whole-batch-mean: a sum over all images' number."""
    batch: int = 128
    """ID images a step."""
    batch_outliers: int = 128
    """Outliers a step; mixers need as many as ID images."""
    outlier_order: Literal["shuffled", "window", "sequential"] = "shuffled"
    """shuffled; window (in order from a random place each epoch, as in OE); sequential (from the first each epoch)."""
    outlier_budget: int = 0
    """Use only this many of the outliers, drawn once (0: all)."""
    augment_id: Views = "crop-flip"
    """Random views of ID images: crop-flip, flip or none. A set is never mirrored if a word of its name is that of a
    set of digits or letters (mnist, emnist, kmnist, qmnist, notmnist, svhn, usps, digits), nor is the demo."""
    augment_outliers: Views = "crop-flip"
    """The same for outliers; flip mirrors them beside digits too (OE on SVHN and MNIST)."""
    hard_from: int = 0
    """Hard outlier mining (OE-M): each epoch score this many random outliers and train on the most confident."""

    def __post_init__(self) -> None:
        check_finite(self)
        if self.epochs < 1 or self.batch < 2 or self.batch_outliers < 1:
            sizes = f"epochs {self.epochs}, batch {self.batch}, batch-outliers {self.batch_outliers}"
            raise UsageError(f"{sizes}: must be at least 1, 2 and 1")
        if not self.lr > 0 or not 0 <= self.lr_min <= self.lr:
            raise UsageError(f"lr {self.lr}, lr-min {self.lr_min}: lr must be above 0, lr-min between 0 and lr")
        if not 0 <= self.warmup < 1 or not 0 <= self.label_smoothing < 1 or self.weight_decay < 0:
            raise UsageError("warmup and label-smoothing must be in [0, 1), weight-decay at least 0")
        if self.outlier_budget < 0 or self.hard_from < 0:
            raise UsageError("outlier-budget and hard-from must be at least 0")
        if self.objective.mixer == "hidden" and self.forward_mode == "separate":
            raise UsageError("mixer hidden: ID and mixtures share a forward; use --forward-mode joint")
        if self.objective.mixer != "none" and self.batch != self.batch_outliers:
            raise UsageError(
                f"mixer {self.objective.mixer}: pairs each ID image with an outlier; "
                f"batch {self.batch} and batch-outliers {self.batch_outliers} must be equal"
            )

    def fitted(self, id_images: int) -> "Recipe":
        """The same recipe with a batch that an ID set of so many images fills, outliers in proportion."""
        if self.batch <= id_images:
            return self
        outliers = max(1, round(self.batch_outliers * id_images / self.batch))
        return replace(self, batch=id_images, batch_outliers=outliers)

    @property
    def images_per_step(self) -> int:
        """Images that go forward and back in one step: the fair unit of compute."""
        goal = self.objective
        return self.batch * (1 + goal.mixed) + self.batch_outliers * goal.raw


# --- methods: the objective of each ------------------------------------------------------------------------------

_OPENMIX = Objective(mixer="linear", target="reject", mix=1.0, beta=(10, 10))
METHODS: dict[str, Objective] = {
    "ce": Objective(),
    "oe": Objective(expose=0.5),  # Hendrycks et al., ICLR 2019
    "entropy": Objective(entropy=0.5),  # Li & Vasconcelos, CVPR 2020
    "energy": Objective(energy=0.1),  # Liu et al., NeurIPS 2020
    "objectosphere": Objective(expose=1.0, ring=1e-4),  # Dhamija et al., NeurIPS 2018
    "background": Objective(expose=1.0, target="reject"),
    "mixoe": Objective(mixer="linear", mix=5.0),  # Zhang et al., WACV 2023
    "mixoe-cutmix": Objective(mixer="cutmix", mix=5.0, beta=(2.0, 2.0)),
    "openmix": _OPENMIX,  # Zhu et al., CVPR 2023
    "openmix-manifold": replace(_OPENMIX, mixer="hidden"),
    # Shinohara et al., arXiv 2509.11892. Only the logit mixture is published in what we could read; the weights,
    # the shared lambda and the distance are derived, not the authors'.
    "logitmixoe": Objective(mixer="logit", mix=1.0, consistency=1.0),
    "oe-m": Objective(expose=1.0),  # hard mining as in the MixOE study
}


def _method(name: str) -> Objective:
    if name not in METHODS:
        raise UsageError(f"method {name!r}: unknown; choose one of {', '.join(METHODS)}")
    return METHODS[name]


def default_recipe(method: str, scratch: bool) -> Recipe:
    """The recipe of ``method`` for small nets: fine-tuning of a checkpoint, or a schedule from scratch."""
    objective = _method(method)
    recipe = Recipe(objective, hard_from=50_000 if method == "oe-m" else 0)
    if scratch:
        recipe = replace(recipe, epochs=14, lr=0.2, warmup=0.2, batch=256, batch_outliers=256)
    return recipe


# --- presets: each paper's or repository's own recipe ----------------------------------------------------------

_COSINE = Recipe(epochs=100, lr=0.1, lr_min=1e-6, batch=128, batch_outliers=256, outlier_order="window")
_TUNE = replace(_COSINE, epochs=10, lr=0.001)
_DIGITS = replace(_COSINE, augment_id="none", augment_outliers="flip")
_STEPS = Recipe(epochs=200, lr=0.1, milestones=(99, 149), nesterov=False)
_IMAGENET = replace(
    _STEPS, epochs=90, milestones=(30, 60, 80), weight_decay=1e-4, lr=0.6, batch=1536, batch_outliers=1536
)
_FINE = Recipe(
    epochs=10, lr=0.001, lr_min=1e-6, weight_decay=1e-5, batch=32, batch_outliers=32, forward_mode="separate"
)
_RESAMPLE = Recipe(epochs=50, lr=0.001, milestones=(30,), nesterov=False)
_VAST = Recipe(epochs=70, lr=0.01, optimizer="adam", milestones=(70,), weight_decay=0.0)


def _with(recipe: Recipe, method: str, **changed: object) -> tuple[str, Recipe]:
    return method, replace(recipe, objective=replace(METHODS[method], **changed))  # type: ignore[arg-type]


PRESETS: dict[str, tuple[str, Recipe]] = {
    # Outlier Exposure (Hendrycks, Mazeika & Dietterich 2019) and its repository
    "msp-cifar": _with(_COSINE, "ce"),
    "oe-cifar-tune": _with(_TUNE, "oe"),
    "oe-cifar-scratch": _with(_COSINE, "oe"),
    "msp-svhn": _with(replace(_DIGITS, epochs=20, lr=0.01), "ce"),
    "msp-tinyimagenet": _with(_COSINE, "ce"),
    "msp-mnist": _with(replace(_DIGITS, epochs=10, lr=0.01, batch=50, batch_outliers=100, weight_decay=0.0), "ce"),
    "oe-svhn-tune": _with(replace(_DIGITS, epochs=5, lr=1e-4), "oe"),
    "oe-svhn-scratch": _with(replace(_DIGITS, epochs=20, lr=0.01), "oe"),
    "oe-tinyimagenet-tune": _with(
        replace(_TUNE, batch_outliers=180, outlier_order="sequential", augment_outliers="none"), "oe"
    ),
    "oe-mnist-tune": _with(replace(_DIGITS, epochs=5, lr=0.01, batch=50, batch_outliers=100, weight_decay=0.0), "oe"),
    "oe-mnist-scratch": _with(
        replace(_DIGITS, epochs=10, lr=0.01, batch=50, batch_outliers=100, weight_decay=0.0), "oe"
    ),
    # Energy-based OOD detection (Liu et al. 2020): margins of the run script
    "energy-cifar10": _with(_TUNE, "energy", m_in=-23.0, m_out=-5.0),
    "energy-cifar100": _with(_TUNE, "energy", m_in=-27.0, m_out=-5.0),
    # Background Data Resampling (Li & Vasconcelos 2020): baseline, and fine-tuning by either loss
    "msp-resample": _with(replace(_RESAMPLE, epochs=100, lr=0.1, milestones=(30, 60, 90)), "ce"),
    "oe-resample": _with(_RESAMPLE, "oe"),
    "entropy-resample": _with(_RESAMPLE, "entropy"),
    # Agnostophobia (Dhamija et al. 2018)
    "entropic-vastlab": _with(_VAST, "objectosphere", ring=0.0),
    "objectosphere-vastlab": _with(_VAST, "objectosphere"),
    "background-vastlab": _with(_VAST, "background"),
    # MixOE (Zhang et al. 2023): only the values for cars are published
    "msp-mixoe": _with(replace(_FINE, epochs=90), "ce"),
    "mixoe-car": _with(_FINE, "mixoe"),
    "mixoe-car-cutmix": _with(_FINE, "mixoe-cutmix"),
    "oe-mixoe": _with(replace(_FINE, batch_outliers=64, forward_mode="joint"), "oe", expose=1.0),
    "oe-m-mixoe": _with(replace(_FINE, batch_outliers=64, forward_mode="joint", hard_from=50_000), "oe-m"),
    "energy-mixoe": _with(replace(_FINE, batch_outliers=64, forward_mode="joint"), "energy", m_in=-13.0, m_out=-6.0),
    "mixoe-openood": _with(
        replace(_FINE, batch=128, batch_outliers=128, weight_decay=5e-4), "mixoe-cutmix", mix=1.0, beta=(0.1, 1.0)
    ),
    # OpenMix (Zhu et al. 2023)
    "msp-openmix": _with(_STEPS, "ce"),
    "openmix-cifar": _with(_STEPS, "openmix"),
    "openmix-manifold-cifar": _with(_STEPS, "openmix-manifold"),
    "openmix-imagenet": _with(replace(_IMAGENET, warmup=5 / 90), "openmix"),
    # LogitMixOE (Shinohara et al. 2025): derived, on the schedules of OE and of MixOE
    "logitmixoe-cifar": _with(replace(_TUNE, batch_outliers=128, outlier_order="shuffled"), "logitmixoe"),
    "logitmixoe-fine": _with(replace(_FINE, forward_mode="joint"), "logitmixoe"),
}


def preset(name: str) -> tuple[str, Recipe]:
    """Method and recipe of a paper. Raises UsageError for an unknown name."""
    if name not in PRESETS:
        raise UsageError(f"preset {name!r}: unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
