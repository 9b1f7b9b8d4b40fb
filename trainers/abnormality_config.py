"""Settings of the abnormality module, apart from the code that needs torch: `--help` should not wait for it."""

from dataclasses import dataclass

from miner.errors import UsageError


@dataclass(frozen=True)
class AbnormalityConfig:
    """Train a decoder, then a risk head, over a frozen classifier: Adam, each with a cosine to zero.

    The paper's 30 and 15 epochs on MNIST are too many for small ID sets: the more the decoder learns by heart, the
    less its errors tell.
    """

    decoder_epochs: int = 10
    """Passes over the ID training set that train the decoder."""
    risk_epochs: int = 5
    """Passes over the ID training set that train the risk head."""
    batch: int = 128
    """Images a step; of the risk head's, a third are normal."""
    lr: float = 1e-3
    """Learning rate at the start of each."""

    def __post_init__(self) -> None:
        if self.decoder_epochs < 1 or self.risk_epochs < 1:
            raise UsageError(f"decoder epochs {self.decoder_epochs}, risk epochs {self.risk_epochs}: at least 1 each")
        if self.batch < 3 or not self.lr > 0:
            raise UsageError(f"batch {self.batch}, lr {self.lr}: at least 3 and above 0 are needed")
