"""Settings of training, apart from the code that needs torch: `--help` should not wait for it."""

from dataclasses import dataclass

from miner.errors import UsageError


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
        _check(self.epochs, self.batch, self.lr)
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup {self.warmup}: must be at least 0 and below 1")


@dataclass(frozen=True)
class FineTuneConfig:
    """Outlier exposure: a joint train-mode forward of ID and outliers, SGD with Nesterov momentum, cosine."""

    epochs: int = 8
    """Passes over the ID training set."""
    batch: int = 128
    """ID images a step; as many outliers join them."""
    lr: float = 0.02
    """Learning rate at the start."""
    weight_decay: float = 5e-4
    """L2 penalty on all parameters."""
    alpha: float = 0.5
    """Weight of the outliers' uniformity loss beside the ID cross-entropy."""

    def __post_init__(self) -> None:
        _check(self.epochs, self.batch, self.lr)


def _check(epochs: int, batch: int, lr: float) -> None:
    if epochs < 1 or batch < 2 or not lr > 0:
        raise UsageError(f"epochs {epochs}, batch {batch}, lr {lr}: at least 1, at least 2 and above 0 are needed")
