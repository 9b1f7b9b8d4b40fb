"""Settings of training, apart from the code that needs torch: `--help` should not wait for it."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes

from miner.errors import UsageError
from miner.files import place
from trainers.recipes import Recipe, check_finite, default_recipe, preset

SEEDS = 1 << 63  # torch takes no larger one
Model = Literal["small", "medium", "wrn-40-2", "wrn-40-4", "wrn-28-10", "resnet18", "densenet-bc-100"]
Method = Literal[
    "ce",
    "oe",
    "entropy",
    "energy",
    "objectosphere",
    "background",
    "mixoe",
    "mixoe-cutmix",
    "openmix",
    "openmix-manifold",
    "logitmixoe",
    "oe-m",
]


@dataclass(frozen=True)
class PretrainConfig:
    """Train a classifier on the ID set: SGD with Nesterov momentum, linear warm-up, then a cosine to zero.

    The defaults are tuned for ``small``; the papers' wide nets want about 100 epochs at lr 0.1, batch 128.
    """

    epochs: int = 14
    """Passes over the ID training set."""
    batch: int = 256
    """Images a step."""
    lr: float = 0.2
    """Peak learning rate."""
    warmup: float = 0.2
    """Share of all steps in which the learning rate climbs to its peak."""
    weight_decay: float = 5e-4
    """L2 penalty on all parameters."""
    label_smoothing: float = 0.0
    """Probability spread evenly over all classes; above zero it blurs the confidence that scores rely on."""

    def __post_init__(self) -> None:
        check_finite(self)
        _check(self.epochs, self.batch, self.lr)
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup {self.warmup}: must be at least 0 and below 1")


def _check(epochs: int, batch: int, lr: float) -> None:
    if epochs < 1 or batch < 2 or not lr > 0:
        raise UsageError(f"epochs {epochs}, batch {batch}, lr {lr}: at least 1, at least 2 and above 0 are needed")


@dataclass(frozen=True)
class TrainConfig:
    """Train a classifier with background images, by any method of the literature.

    The flags below --recipe and --objective show the values of the chosen --method or --preset; each can be changed.
    """

    method: Method = "oe"
    """What is minimised. `ce` uses no outliers: the baseline."""
    preset: str | None = None
    """A paper's own recipe instead of the default one for small nets (oe-cifar-tune, openmix-cifar, ...; a wrong
    name lists them all). It says which method."""
    id: str = "demo"
    """ID set: a folder of train-*.tar / test-*.tar or of train/CLASS and test/CLASS images, a torchvision name
    (cifar10), or `demo`."""
    outliers: str | None = None
    """Background images: a gamma-subset, a pool (folder, URL or name), a folder of tars, one tar, an image folder, a
    torchvision name or an .npy array uint8 [N, H, W, 3]. Where there is a train half (train-*.tar, train/ beside test/,
    a train split), it is taken and nothing else. Default for the demo ID set: the demo pool."""
    ood: tuple[str, ...] = ()
    """OOD test sets that will judge this classifier: training is refused if outliers are among their images."""
    allow_overlap: bool = False
    """Train even if outliers are among the images of the ID set or of --ood."""
    long_tail: float | None = None
    """Cut the ID training set to an exponential profile; the rarest class keeps this share of the most frequent."""
    hold_out: str = ""
    """Classes left out of ID, which `pipelines.evaluate` knows as the set `held-out`: labels (3,5,7),
    random:COUNT:SEED, or MixOE's own splits (mixoe:car:0)."""
    size: int = 32
    """Pixels a side."""
    model: Model = "small"
    """Classifier. `small` and `medium` make a CPU run practical."""
    checkpoint: str | None = None
    """Start from this classifier (a .safetensors file or a run directory, or its URL); without one, training is from
    scratch."""
    seed: int = 0
    """Same seed, threads, workers and machine: same classifier, bit for bit."""
    threads: int = 0
    """CPU threads of a process. 0: all cores but one, shared among the workers."""
    workers: int = 1
    """Processes that train together, each on its share of every batch; one GPU each where there are GPUs."""
    out: Path | None = None
    """Run directory. Default: runs/<method>-<id>-s<seed>."""
    resume: bool = False
    """Go on after the last finished epoch of --out; an error if nothing is there. (The same command run again also
    goes on; this flag only insists.)"""
    recipe: Annotated[Recipe, OmitArgPrefixes] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        check_finite(self)
        if re.match(r"\w+:/", str(self.out)):  # a Path has lost the other slash
            raise UsageError(f"--out {self.out}: training writes to a local folder; only mining writes to a URL")
        if self.workers < 1 or self.threads < 0 or self.seed < 0 or self.size < 8:
            raise UsageError(
                f"workers {self.workers}, threads {self.threads}, seed {self.seed}, size {self.size}: "
                "at least 1, 0, 0 and 8 are needed"
            )
        if self.seed >= SEEDS:
            raise UsageError(f"seed {self.seed}: must be below 2^63")

    @classmethod
    def default(cls, method: str | None, preset_name: str | None, scratch: bool) -> "TrainConfig":
        """What the flags start from. Raises UsageError for unknown names, and a preset of another method."""
        if not preset_name:
            method = method or "oe"
            return cls(method=method, recipe=default_recipe(method, scratch))  # type: ignore[arg-type]
        own, recipe = preset(preset_name)
        if method not in (None, own):
            raise UsageError(f"--preset {preset_name}: is a recipe of --method {own}, not {method}")
        return cls(method=own, preset=preset_name, recipe=recipe)  # type: ignore[arg-type]

    @property
    def run_dir(self) -> Path:
        """Where the run lives."""
        name = self.preset or self.method
        return self.out or Path("runs") / f"{name}-{Path(self.id.rstrip('/')).name}-s{self.seed}"

    @property
    def background(self) -> str | None:
        """The outliers' specification; None when the objective needs none."""
        if not self.recipe.objective.outliers:
            return None
        if not self.outliers and self.id != "demo":
            raise UsageError(f"--method {self.method}: needs background images; name some with --outliers")
        return self.outliers or "demo-pool"

    def settings(self) -> dict[str, Any]:
        """What decides the result: a run can be continued only under the same settings."""
        skipped = ("out", "resume", "ood", "allow_overlap")
        found = {name: value for name, value in asdict(self).items() if name not in skipped}
        checkpoint = str(place(self.checkpoint)) if self.checkpoint else None
        return found | {"checkpoint": checkpoint, "outliers": self.background}
