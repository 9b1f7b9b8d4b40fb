"""Test-time scores of a trained classifier: float64 [n], HIGHER = MORE IN-DISTRIBUTION, whatever the paper's sign.

A net with a reject output has K + 1 logits, the last of them the reject class. Every score but "reject" cuts it off
before anything else is computed: a softmax over K + 1 outputs gives other values (OpenMix).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from miner.errors import MinerError, UsageError
from trainers.abnormality import Abnormality
from trainers.data import normalise, tensor
from trainers.models import Net
from trainers.train import eval_mode, features_and_logits

NAMES = (
    "msp",
    "maxlogit",
    "energy",
    "neg-entropy",
    "ce-to-uniform",
    "odin",
    "objectosphere",
    "reject",
    "abnormality",
)

_BACKWARD = 100  # images a backward pass of ODIN: it keeps all activations, up to 30 MB an image


@dataclass(frozen=True)
class Outputs:
    """What a classifier says of n images: logits float64 [n, K or K + 1], penultimate features float32 [n, D]."""

    logits: np.ndarray
    features: np.ndarray


def outputs(net: Net, images: np.ndarray, batch: int = 1000) -> Outputs:
    """One eval-mode forward of uint8 images [n, S, S, 3], on the net's device; the net's mode is put back.

    Raises MinerError when there are no images.
    """
    logits, features = [], []
    with eval_mode(net), torch.no_grad():
        for x in _batches(net, images, batch):
            trunk, head = features_and_logits(net, x)
            features.append(trunk.cpu())
            logits.append(head.double().cpu())
    return Outputs(torch.cat(logits).numpy(), torch.cat(features).numpy())


def probabilities(logits: np.ndarray, classes: int) -> np.ndarray:
    """Softmax over the first ``classes`` logits, float64 [n, classes]. Raises as ``score`` does."""
    return np.exp(_log_softmax(_sliced(logits, classes)))


def score(
    name: str,
    out: Outputs,
    classes: int,
    *,
    net: Net | None = None,
    images: np.ndarray | None = None,
    temperature: float = 1000.0,
    epsilon: float = 0.0014,
    module: Abnormality | None = None,
) -> np.ndarray:
    """The score ``name`` of each image, float64 [n], higher = more in-distribution.

    With z the first K = ``classes`` logits, p their softmax, LSE the log of the summed exponentials, F the features:
    msp max p; maxlogit max z; energy LSE z (T = 1); neg-entropy sum p log p; ce-to-uniform LSE z - mean z;
    objectosphere msp |F|; reject -p_K of the softmax over K + 1; odin see ``odin`` (``temperature``, ``epsilon``);
    abnormality the ``module``'s probability of a normal image. The last two need ``net`` and the uint8 ``images``.

    Raises UsageError for an unknown name, a score that this net cannot give and a missing net, images or module,
    MinerError for logits of another number of classes, or that are not finite.
    """
    if name in ("odin", "abnormality"):
        if net is None or images is None:
            raise UsageError(f"score {name}: needs the net and the images, not its outputs alone")
        if name == "odin":
            return odin(net, images, classes, temperature, epsilon)
        if module is None:
            raise UsageError("score abnormality: needs an abnormality module trained on this classifier")
        return module.risk(net, images)
    if name == "reject":
        if out.logits.shape[1] != classes + 1:
            raise UsageError("score reject: this classifier has no reject output; train one with openmix or background")
        return -probabilities(out.logits, classes + 1)[:, classes]
    if name not in _OF_LOGITS:
        raise UsageError(f"score {name!r}: unknown; choose from {', '.join(NAMES)}")
    values = _OF_LOGITS[name](_sliced(out.logits, classes))
    return values * np.linalg.norm(out.features.astype(np.float64), axis=1) if name == "objectosphere" else values


def odin(
    net: Net, images: np.ndarray, classes: int, temperature: float = 1000.0, epsilon: float = 0.0014, batch: int = 1000
) -> np.ndarray:
    """ODIN (Liang et al. 2018): max softmax(z / T) of images moved by ``epsilon`` to raise just that, float64 [n].

    ``epsilon`` is in units of the normalised pixels (x/255 - 0.5)/0.25: a paper's step in [0, 1] pixels, divided
    by its channel deviation as in energy_ood, is 4 times as much here. T = 1 and epsilon = 0 give MSP exactly.
    Raises UsageError for a temperature of 0 or less and for a negative epsilon, MinerError as ``score``.
    """
    if not temperature > 0 or not epsilon >= 0:
        raise UsageError(f"odin temperature {temperature}, epsilon {epsilon}: above 0 and at least 0 are needed")
    confidence = []
    with eval_mode(net):
        for x in _batches(net, images, batch):
            if epsilon:
                uphill = [rise(net, part, classes, temperature) for part in x.split(_BACKWARD)]
                x = x + epsilon * torch.cat(uphill)
            with torch.no_grad():
                logits = features_and_logits(net, x)[1].double().cpu().numpy()
            confidence.append(np.exp(_log_softmax(_sliced(logits, classes) / temperature).max(axis=1)))
    return np.concatenate(confidence)


def rise(net: Net, x: Tensor, classes: int, temperature: float) -> Tensor:
    """Sign (-1, 0 or 1) of the gradient of log max softmax(z / T) in each of the pixels ``x`` [n, 3, S, S].

    In the precision of ``x``, without autocast: small bfloat16 gradients lose their sign.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = net(x)[:, :classes] / temperature
        (gradient,) = torch.autograd.grad(logits.log_softmax(dim=1).amax(dim=1).sum(), x)
    return gradient.sign()


def _batches(net: Net, images: np.ndarray, batch: int) -> Iterator[Tensor]:
    """Normalised batches float32 [b, 3, S, S] on the net's device."""
    if len(images) == 0:
        raise MinerError("scores: no images to score")
    device = next(net.parameters()).device
    for start in range(0, len(images), batch):
        yield normalise(tensor(images[start : start + batch]).to(device))


def _sliced(logits: np.ndarray, classes: int) -> np.ndarray:
    """The first ``classes`` of ``logits`` [n, classes or classes + 1] in float64."""
    if logits.ndim != 2 or logits.shape[1] not in (classes, classes + 1):
        raise MinerError(f"logits {list(logits.shape)}: {classes} classes need as many outputs, or one more (reject)")
    if not np.isfinite(logits).all():
        raise MinerError("logits: some are not finite; the classifier diverged, train it anew with a lower --lr")
    return logits[:, :classes].astype(np.float64)


def _lse(z: np.ndarray) -> np.ndarray:
    """log sum exp of each row, without overflow."""
    peak = z.max(axis=1)
    return peak + np.log(np.exp(z - peak[:, None]).sum(axis=1))


def _log_softmax(z: np.ndarray) -> np.ndarray:
    return z - _lse(z)[:, None]


def _msp(z: np.ndarray) -> np.ndarray:
    return np.exp(_log_softmax(z).max(axis=1))


def _neg_entropy(z: np.ndarray) -> np.ndarray:
    log_p = _log_softmax(z)
    return (np.exp(log_p) * log_p).sum(axis=1)


_OF_LOGITS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "msp": _msp,
    "maxlogit": lambda z: z.max(axis=1),
    "energy": _lse,
    "neg-entropy": _neg_entropy,
    "ce-to-uniform": lambda z: _lse(z) - z.mean(axis=1),
    "objectosphere": _msp,
}
