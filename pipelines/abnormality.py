"""Train an abnormality module (Hendrycks & Gimpel 2017) over a finished classifier, which stays as it is.

python -m pipelines.abnormality runs/oe-demo-s0

A decoder redraws the image from the classifier's features; a risk head judges from features, logits and what the
decoder got wrong. Abnormal are distorted ID images, or the images of --outliers. Leaves abnormality.safetensors beside
the checkpoint; judge it with `python -m pipelines.evaluate RUN --abnormality RUN/abnormality.safetensors`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional

from miner.errors import UsageError
from pipelines import cli
from trainers.abnormality_config import AbnormalityConfig
from trainers.config import SEEDS

DEFAULT = "abnormality.safetensors"


@dataclass(frozen=True)
class ModuleConfig:
    """What the module is trained on."""

    checkpoint: Positional[Path]
    """Run directory of pipelines.train or pipelines.resample, or a checkpoint file."""
    id: str | None = None
    """ID set. Default: what the checkpoint says."""
    outliers: str | None = None
    """Real outliers (a gamma-subset, tars, ...; the train half where there is one) in the place of distorted ID
    images."""
    allow_overlap: bool = False
    """Train even if outliers are among the images of the ID set."""
    seed: int = 0
    """Same seed, threads and machine: same module."""
    threads: int = 1
    """CPU threads."""
    out: Path | None = None
    """File to write. Default: abnormality.safetensors beside the checkpoint."""
    training: Annotated[AbnormalityConfig, OmitArgPrefixes] = field(default_factory=AbnormalityConfig)

    def __post_init__(self) -> None:
        if self.threads < 1 or not 0 <= self.seed < SEEDS:
            raise UsageError(f"threads {self.threads}, seed {self.seed}: at least 1, and 0 to 2^63 - 1, are needed")


def main() -> None:
    """Parse, train, save."""
    import tyro

    config = tyro.cli(ModuleConfig, prog="python -m pipelines.abnormality", description=__doc__)
    import numpy as np
    import torch

    from miner.progress import Display, Steps
    from pipelines.judge import open_id
    from trainers.abnormality import save_abnormality, train_abnormality
    from trainers.checkpoint import open_checkpoint
    from trainers.image_set import ImageSet
    from trainers.overlap import refuse_overlap
    from trainers.sets import open_outliers

    torch.set_num_threads(config.threads)
    net, meta = open_checkpoint(config.checkpoint)
    spec, size = config.id or meta.get("id"), meta.get("size", 32)
    if spec is None:
        raise UsageError(f"{config.checkpoint}: does not say which ID set it was trained on; name it with --id")
    id_set, _ = open_id(meta, spec, size)
    folder = config.checkpoint if config.checkpoint.is_dir() else config.checkpoint.parent
    path = config.out or folder / DEFAULT
    path.parent.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"id": spec, "seed": config.seed, "outliers": None}
    outliers = None
    if config.outliers:
        found = open_outliers(config.outliers, size, config.seed)
        halves = {"the ID training set": id_set.train_images, "the ID test set": id_set.test_images}
        inside = {name: ImageSet(name, (images,)) for name, images in halves.items()}
        refuse_overlap(found, inside, config.allow_overlap)
        outliers, facts["outliers"] = found.take(np.arange(len(found))), found.origin
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Display() as display:
        module, report = train_abnormality(net, id_set, config.training, config.seed, device, Steps(display), outliers)
    save_abnormality(path, module, facts)
    print(f"decoder loss {report['decoder_loss']:.4f}, risk loss {report['risk_loss']:.4f}, {report['seconds']:.0f} s")
    print(path)


if __name__ == "__main__":
    cli.run(main)
