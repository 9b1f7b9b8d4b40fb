"""Settings of ``pipelines.compare``: the text under a field is its ``--help``. Torch-free, so that help is fast."""

from dataclasses import dataclass
from pathlib import Path

from trainers.config import Method, Model


@dataclass(frozen=True)
class Compare:
    """Which outliers, found how, make the best detector?

    Every field but the budget may have several values; all combinations are tried. Adding values to a finished
    comparison (same --out) costs only what is new, and the tables show everything that is there.
    """

    pool: tuple[str, ...] = ("demo",)
    """Background pool(s): a folder, a URL, or a name under $OUTLIER_POOLS; `demo` is drawn on the spot."""
    id: tuple[str, ...] = ("demo",)
    """In-distribution set(s): folders of train-*.tar / test-*.tar, torchvision names (cifar10), or `demo`."""
    ood: tuple[str, ...] = ()
    """Far OOD test sets: folders of tars or images, torchvision names. Default for the demo ID set: its nine held-out
    families."""
    near: tuple[str, ...] = ()
    """Near OOD test sets."""
    noise: tuple[str, ...] = ("gaussian", "uniform")
    """Noise as OOD test sets: gaussian, uniform, rademacher, blob; none at all: `--noise` with nothing behind it."""
    selectors: tuple[str, ...] = ("none", "random", "mined", "toploss")
    """Which outliers: none (cross-entropy alone, as many passes over ID), full (the whole pool), random, mined (the
    defaults of pipelines.resample), or a rule of pipelines.resample as published, without leak guard and strata
    (toploss, reference, ...). Settings of pipelines.resample go behind a colon, by their Python names:
    mined:exclude_near_id=0,strata=0."""
    gamma: tuple[float, ...] = (0.01,)
    """Share(s) of the pool to keep."""
    methods: tuple[Method, ...] = ("oe",)
    """How a classifier is trained with outliers."""
    models: tuple[Model, ...] = ("small",)
    """Classifier(s)."""
    seeds: tuple[int, ...] = (0, 1)
    """A seed is one whole repetition: classifier, mining and fine-tuning."""
    images: int | None = None
    """Images forwarded and back in each fine-tuning, ID, outliers and mixtures together, as near as whole passes over
    ID come: --dry-run says how near. Default: 300,000; 20,000 for the demo."""
    epochs: int = 14
    """Passes over ID that make the classifier which mining and fine-tuning start from."""
    lr: float | None = None
    """Peak learning rate of fine-tuning. Default: each method's own."""
    transfer: bool = False
    """Also train on subsets that `mined` found for another of --models or --id, and on rankings pooled over --id."""
    flag: str | None = None
    """Entry of class_info in pool.json that marks a class, e.g. `cifar10_strict`: each subset's share of such images
    is reported."""
    allow_overlap: bool = False
    """Train even on outliers that are among the ID or OOD test images; without it such cells fail."""
    jobs: int | None = None
    """Trainings at once. Default: one a CPU slot, or one a GPU where there are GPUs; more than GPUs share them."""
    address: str | None = None
    """Ray cluster to join (`auto` or host:port); data and --out then lie on a disk that all nodes see. Default: a
    private Ray on this machine."""
    out: Path = Path("runs/compare")
    """Where everything goes. The same command goes on with what is missing."""
    dry_run: bool = False
    """Print what would be done and what it costs, and stop."""

    @property
    def far(self) -> tuple[str, ...]:
        """The far OOD sets, the demo's own where none are given."""
        return self.ood or (("demo",) if set(self.id) == {"demo"} else ())

    @property
    def budget(self) -> int:
        """Images forwarded and back in each fine-tuning."""
        return self.images if self.images is not None else (20_000 if set(self.id) == {"demo"} else 300_000)
