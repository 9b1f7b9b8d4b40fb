"""Every setting of a mining run: one frozen dataclass a concern; the text under a field is its ``--help``."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes

from miner.files import Place, place
from trainers.config import Model, PretrainConfig

Rule = Literal["hedge", "paper", "reference", "equilibrium", "uniform", "toploss", "ntom", "dos", "poem"]
Draw = Literal["rank", "eq20", "topk", "random"]
ONE_SWEEP = ("ntom", "dos", "poem")  # these order the pool once, at theta_0: see miner.baselines
MOST_VIEWS = 6
PLAYED = ("paper", "reference", "equilibrium")  # one round of these says little
ORDERED = ("toploss", *ONE_SWEEP)  # drawn heaviest first, unless --draw says otherwise


@dataclass(frozen=True)
class Data:
    """What is mined, for whom."""

    pool: str = "demo"
    """Background pool: a folder, a URL, or a name under $OUTLIER_POOLS; `demo` is drawn on the spot."""
    id: str = "demo"
    """In-distribution set: a folder of train-*.tar / test-*.tar, a torchvision name (cifar10), or `demo`."""
    model: Model = "small"
    """Classifier. `small` and `medium` make a CPU run practical."""
    checkpoint: str | None = None
    """Trained classifier (.safetensors), a file or a URL. Without one, the classifier is first trained on --id."""
    size: int = 32
    """Pixels a side at which images are scored. The subset keeps the original bytes."""
    seed: int = 0
    """Same seed and same kind of CPU: same subset, byte for byte, on any number of actors."""


@dataclass(frozen=True)
class Game:
    """How weights are learned."""

    rule: Rule = "hedge"
    """How losses become weights. `uniform` and `toploss` are controls, `reference` is the released update; `ntom`,
    `dos` and `poem` order the pool by one sweep as the miners of these names do."""
    rounds: int | None = None
    """Sweeps over the pool, with training between them; 1 scores once and never trains. Default: 5 for `paper`,
    `reference` and `equilibrium`, which live on the game, else 1. `ntom`, `dos` and `poem` always look once."""
    converged: float | None = None
    """Play no further round once the weights of two rounds in a row agree to this Spearman correlation, e.g. 0.99.
    Default: play all --rounds. `reference` moves too little in a round to be told by it."""
    steps: int = 100
    """Training steps between two sweeps (under `reference`: all the work of a round)."""
    eta: float = 1.0
    """Step size of `hedge` (in standard deviations of the loss) and of `paper` (in units of the loss)."""
    cap: float = 20.0
    """`hedge`: no image weighs more than this many times the mean, so that the game stays one about subsets."""
    batch: int = 128
    """Images a training step: this many ID and as many background."""
    alpha: float = 0.5
    """Weight of the background loss beside cross-entropy (paper: 0.5)."""
    lr: float = 0.001
    """Learning rate of the classifier in the game (paper: 0.001). BatchNorm stays frozen."""
    views: int = 6
    """Views of an image that its loss is averaged over, at most 6: itself, mirrored, shifted. Each costs a sweep."""
    smooth: float = 0.5
    """Share of an image's loss that is its class's mean loss, where the pool has classes: one net's opinion of one
    image is noisy. 0: none."""
    threads: int = 1
    """CPU threads that train. Part of the result: gradients are summed in as many parts. Scoring, which does not
    depend on it, uses all cores but one anyway."""
    parts: int = 1
    """Parts that a training step's batch is cut into, so that as many --trainers can share it. Part of the result:
    gradients are added up part by part, by however many trainers. 1: the first one trains, the others only score."""

    @property
    def effective_rounds(self) -> int:
        """Rounds that are played."""
        if self.rule in ONE_SWEEP:
            return 1
        return self.rounds if self.rounds is not None else 5 if self.rule in PLAYED else 1


@dataclass(frozen=True)
class Selection:
    """How weights become a subset."""

    gamma: tuple[float, ...] = (0.01,)
    """Share(s) of the pool to keep, each in (0, 1]; several cost one mining and are nested."""
    draw: Draw | None = None
    """`rank` (inclusion ~ weight, exact size), `eq20` (the paper's Bernoulli draw), `topk`, `random`.
    Default: rank, but topk for --rule toploss, ntom, dos and poem."""
    strata: int | None = None
    """Feature clusters that take turns in the ranking, so that hardness does not mean one kind of image.
    0: none (not for --rule dos, whose clusters they are). Default: one for every 100 images, at most 1,024."""
    exclude_near_id: float = 0.15
    """Leak guard: leave out what is nearer to the ID set (cosine of the 50th ID neighbour) than this share of the ID
    training images are. 0: off; more leaves out less."""
    guard: Literal["class", "image"] = "class"
    """The guard judges classes of the pool by their mean, where it has classes; or every image by itself."""


@dataclass(frozen=True)
class Machines:
    """Where it runs. None of this changes the result."""

    pool_actors: int | None = None
    """Processes that own pool shards and weights. Default: one a core, at most one a shard and 16."""
    trainers: int = 1
    """Processes that score, one GPU each where there are GPUs. The first one also trains, or, with --parts, as many."""
    resident: bool | None = None
    """Keep images in the trainers' memory from one sweep to the next, as far as half of what is free goes, so that only
    losses travel. Default: on GPUs."""
    address: str | None = None
    """Ray cluster to join (`auto` or host:port); pool and --out then lie on a disk that all nodes see, or at URLs.
    Default: a private Ray on this machine."""
    autoscale: bool = False
    """Machines of the cluster at --address start on demand (cluster.yaml): ask for a GPU and a CPU for each trainer
    and a CPU for each pool actor (set --pool-actors), and wait until they are there."""


@dataclass(frozen=True)
class Output:
    """What is kept."""

    out: str | None = None
    """Run directory, a folder or a URL (`s3://bucket/run`). Default: runs/<pool>-<id>-<rule>-s<seed>."""
    resume: bool = False
    """Go on from the last finished round of --out; an error if nothing is there. (The same command run again
    also goes on; this flag only insists.)"""
    dry_run: bool = False
    """Print the plan and sizes, measure some of the work here for a few seconds, print what all of it will take, and
    stop."""


@dataclass(frozen=True)
class Fleet:
    """Machines that --dry-run predicts a run for, besides this one. Nothing else heeds it."""

    nodes: int = 0
    """Machines, all alike. 0: predict for this machine only. Of the settings above --pool-actors holds there too."""
    gpus: int = 0
    """GPUs of each, with a trainer on every one. 0: one trainer on the cores of each machine."""
    cores: int | None = None
    """CPU cores of each. Default: as many as here."""
    gpu_images: float | None = None
    """Images a second that one GPU scores in one view. Default: as measured here, on a machine with a GPU."""
    gpu_look_ups: float | None = None
    """Images a second whose nearest ID images and stratum one GPU finds. Default: as measured here; where no GPU is, on
    the cores that a trainer has to itself."""
    gigabytes: float = 1.0
    """10^9 bytes a second between one machine and the pool's disk or store, the run's, and the other machines."""
    dollars: float = 0.0
    """Price of one machine an hour."""


@dataclass(frozen=True)
class Config:
    """Mine a gamma-subset of background images for a classifier."""

    data: Annotated[Data, OmitArgPrefixes] = field(default_factory=Data)
    game: Annotated[Game, OmitArgPrefixes] = field(default_factory=Game)
    selection: Annotated[Selection, OmitArgPrefixes] = field(default_factory=Selection)
    machines: Annotated[Machines, OmitArgPrefixes] = field(default_factory=Machines)
    output: Annotated[Output, OmitArgPrefixes] = field(default_factory=Output)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    fleet: Fleet = field(default_factory=Fleet)

    @property
    def draw(self) -> Draw:
        """The draw asked for, or the rule's natural one."""
        return self.selection.draw or ("topk" if self.game.rule in ORDERED else "rank")

    @property
    def run_dir(self) -> Place:
        """Where the run lives."""
        names = (self.data.pool, self.data.id)
        short = "-".join(dict.fromkeys(Path(name.rstrip("/")).name for name in names))
        return place(self.output.out or f"runs/{short}-{self.game.rule}-s{self.data.seed}")

    @property
    def guarded(self) -> bool:
        """Whether the frozen classifier's neighbours or strata are asked for, which takes a sweep."""
        return self.selection.exclude_near_id > 0 or self.selection.strata != 0

    def strata_for(self, rows: int) -> int:
        """Number of strata for a pool of ``rows`` images."""
        chosen = self.selection.strata
        return min(max(rows // 100, 1), 1024) if chosen is None else min(chosen, rows)

    def mining(self) -> dict[str, Any]:
        """The settings that decide the weights: a run can be continued only under the same ones."""
        settings = {"data": asdict(self.data), "game": asdict(self.game), "pretrain": asdict(self.pretrain)}
        settings["game"]["rounds"] = self.game.effective_rounds
        settings["data"]["checkpoint"] = str(place(self.data.checkpoint)) if self.data.checkpoint else None
        settings["guard"] = {
            "strata": self.selection.strata,
            "exclude_near_id": self.selection.exclude_near_id,
            "by": self.selection.guard,
        }
        return settings
