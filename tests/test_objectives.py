"""Objectives: golden vectors, the identities that tie the methods together, mixing, and the papers' presets."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from miner.errors import UsageError
from trainers import models
from trainers.config import PretrainConfig, TrainConfig
from trainers.objectives import (
    Draw,
    Outputs,
    base_target,
    consistency,
    draw,
    energy,
    entropy,
    forward,
    losses,
    mix_images,
    mixed_target,
    soft_cross_entropy,
    total,
)
from trainers.recipes import METHODS, PRESETS, Objective, Recipe, default_recipe, preset
from trainers.train import uniformity

IN = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.5, 0.0]])
OUT = torch.tensor([[1.0, 1.0, 1.0], [3.0, 0.0, 0.0], [-1.0, 2.0, 0.5]])
LABELS = torch.tensor([0, 2])
FEATURES = torch.zeros(2, 2)
NO_FEATURES = torch.zeros(3, 2)


def value(goal: Objective, out: Outputs, lam: float = 1.0, reduction: str = "per-group-mean", images: int = 0) -> float:
    return sum(total(losses(goal, out, LABELS, lam), reduction, images).values()).item()


def raw(inside=IN, outside=OUT, features=FEATURES, others=NO_FEATURES) -> Outputs:
    return Outputs(inside, features, outside, others)


def close(a: float, b: float) -> bool:
    return a == pytest.approx(b, abs=2e-6)


def test_golden_cross_entropy_and_oe():
    assert close(value(METHODS["ce"], raw()), 1.067107)
    to_uniform = soft_cross_entropy(OUT, base_target(OUT, "uniform"))
    assert torch.allclose(to_uniform, torch.tensor([1.098612, 2.094923, 1.741311]), atol=1e-6)
    assert close(uniformity(OUT).mean().item(), 0.546337)
    assert torch.allclose(to_uniform - uniformity(OUT), torch.full((3,), np.log(3), dtype=torch.float32), atol=1e-6)
    assert close(value(METHODS["oe"], raw()), 1.889582)
    assert close(value(METHODS["oe"], raw(), reduction="whole-batch-mean", images=5), 0.920328)


def test_golden_entropy_and_energy():
    assert torch.allclose(entropy(OUT), torch.tensor([1.098612, 0.366594, 0.621585]), atol=1e-6)
    assert close(value(METHODS["entropy"], raw()), 0.719309)
    assert torch.allclose(energy(IN), torch.tensor([-2.169846, -1.964369]), atol=1e-6)
    assert torch.allclose(energy(OUT), torch.tensor([-2.098612, -3.094923, -2.241311]), atol=1e-6)
    goal = replace(METHODS["energy"], m_in=-3.0, m_out=-2.0)
    assert close(value(goal, raw()), 1.197419)
    assert close(value(replace(goal, ce=0.0, energy=1.0), raw()), 1.303114)


def test_golden_mixoe():
    target = mixed_target(LABELS, 0.7, IN, "uniform")
    assert torch.allclose(target, torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]]), atol=1e-6)
    rows = soft_cross_entropy(IN, target)
    assert torch.allclose(rows, torch.tensor([0.669846, 1.764369]), atol=1e-6)
    goal = replace(METHODS["mixoe"], mix=1.0)
    assert close(value(goal, Outputs(IN, FEATURES, mixed=IN), 0.7), 1.067107 + 1.217107)


def test_golden_openmix():
    z = torch.tensor([[2.0, 0.0, -1.0, 0.5], [0.5, 1.5, 0.0, 1.0]])
    out = Outputs(z, FEATURES, mixed=z)
    terms = losses(METHODS["openmix"], out, LABELS, 0.7)
    assert torch.allclose(terms["mix"][0], torch.tensor([0.792350, 1.987339]), atol=1e-6)
    assert close(value(METHODS["openmix"], out, 0.7), 2.704688)


def test_golden_objectosphere():
    inside, outside = torch.tensor([[3.0, 4.0], [0.6, 0.8]]), torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.3, 0.4]])
    terms = losses(replace(METHODS["objectosphere"], ring=1.0, xi=6.0), raw(IN, OUT, inside, outside), LABELS, 1.0)
    assert torch.allclose(terms["ring"][0], torch.tensor([1.0, 25.0]))
    assert torch.allclose(terms["ring"][1], torch.tensor([1.0, 4.0, 0.25]))


def test_gradient_of_oe_is_p_minus_uniform():  # property 1
    z = OUT.clone().requires_grad_()
    terms = total(losses(METHODS["oe"], raw(outside=z), LABELS, 1.0), "per-group-mean", 0)
    terms["expose"].backward()
    assert z.grad is not None
    assert torch.allclose(z.grad, 0.5 * (OUT.softmax(1) - 1 / 3) / len(OUT), atol=1e-7)


def test_mixtures_at_their_ends_are_the_plain_methods():  # properties 2, 3, 4, 5
    ce = F.cross_entropy(IN, LABELS).item()
    mixoe = METHODS["mixoe"]
    assert close(value(mixoe, Outputs(IN, FEATURES, mixed=IN), 1.0), 6 * ce)
    oe = replace(METHODS["oe"], expose=5.0)
    assert close(value(mixoe, Outputs(IN, FEATURES, mixed=OUT[:2]), 0.0), value(oe, raw(outside=OUT[:2])))
    z, reject = torch.randn(2, 4), torch.tensor([3, 3])
    openmix = METHODS["openmix"]
    assert close(value(openmix, Outputs(z, FEATURES, mixed=z), 1.0), 2 * F.cross_entropy(z, LABELS).item())
    only = replace(openmix, ce=0.0)
    assert close(value(only, Outputs(z, FEATURES, mixed=z), 0.0), F.cross_entropy(z, reject).item())
    logit = Objective(mixer="logit", mix=5.0)
    assert close(value(logit, raw(outside=OUT[:2]), 1.0), 6 * ce)


def test_logitmixoe_holds_oe_and_mixoe():
    out = Outputs(IN, FEATURES, OUT[:2], FEATURES, mixed=OUT[1:])
    oe = replace(METHODS["logitmixoe"], mix=0.0, consistency=0.0, expose=0.5)
    assert close(value(oe, out, 0.3), value(METHODS["oe"], raw(outside=OUT[:2])))
    linear = replace(METHODS["mixoe"], mix=1.0)
    same = Outputs(IN, FEATURES, mixed=OUT[1:])
    mixture = 0.3 * IN + 0.7 * OUT[:2]
    terms = losses(METHODS["logitmixoe"], out, LABELS, 0.3)
    assert torch.allclose(terms["mix"][0], soft_cross_entropy(mixture, mixed_target(LABELS, 0.3, IN, "uniform")))
    assert torch.allclose(terms["consistency"][0], (OUT[1:] - mixture).square().sum(1) / 3)
    assert close(losses(linear, same, LABELS, 0.3)["mix"][0].sum().item(),
                 soft_cross_entropy(OUT[1:], mixed_target(LABELS, 0.3, IN, "uniform")).sum().item())  # fmt: skip


def test_consistency_distances():
    shifted = IN + 3.0
    assert consistency(IN, shifted, "mse").tolist() == pytest.approx([9.0, 9.0])
    for blind in ("centred", "kl"):
        assert consistency(IN, shifted, blind).abs().max() < 1e-5
    p, q = IN.softmax(1), OUT[:2].softmax(1)
    assert torch.allclose(consistency(OUT[:2], IN, "kl"), (p * (p / q).log()).sum(1), atol=1e-6)
    out = Outputs(IN.clone().requires_grad_(), FEATURES, OUT[:2], FEATURES, mixed=OUT[1:])
    for detach in (False, True):
        goal = replace(METHODS["logitmixoe"], detach_target=detach)
        assert losses(goal, out, LABELS, 0.5)["consistency"][0].requires_grad is not detach


def test_energy_is_zero_inside_both_margins():  # property 6
    terms = losses(replace(METHODS["energy"], m_in=-1.0, m_out=-4.0), raw(), LABELS, 1.0)
    assert all(rows.eq(0).all() for rows in terms["energy"])


def test_background_class_is_plain_cross_entropy():
    z = torch.randn(3, 4)
    out = Outputs(z[:2], FEATURES, z, NO_FEATURES)
    expected = F.cross_entropy(z[:2], LABELS) + F.cross_entropy(z, torch.tensor([3, 3, 3]))
    assert close(value(METHODS["background"], out), expected.item())


def test_cutmix_share_is_exactly_the_id_pixels_left():  # property 10
    goal = METHODS["mixoe-cutmix"]
    inside, outside = torch.ones(2, 3, 32, 32), torch.zeros(2, 3, 32, 32)
    shares = []
    for step in range(200):
        chance = draw(goal, 32, 0, step)
        mixed = mix_images(inside, outside, goal, chance)
        assert mixed.mean().item() == pytest.approx(chance.lam, abs=1e-6)
        shares.append(chance.lam)
    assert 0 <= min(shares) < 0.3
    assert 0.9 < max(shares) <= 1
    assert torch.equal(inside, torch.ones_like(inside))  # the ID images themselves stay whole


def test_draws_follow_beta_and_repeat():
    goal = METHODS["openmix"]
    lams = np.array([draw(goal, 32, 1, step).lam for step in range(2000)])
    assert lams.mean() == pytest.approx(0.5, abs=0.02)
    assert ((lams > 0.3) & (lams < 0.7)).mean() == pytest.approx(0.935, abs=0.02)
    assert draw(goal, 32, 1, 7) == draw(goal, 32, 1, 7) != draw(goal, 32, 2, 7)
    layers = [draw(METHODS["openmix-manifold"], 32, 0, step).layer for step in range(300)]
    assert min(layers.count(layer) for layer in (0, 1, 2)) > 60


@pytest.mark.parametrize("method", METHODS)
def test_forward_sends_what_the_objective_needs(method):
    recipe = Recipe(METHODS[method], batch=4, batch_outliers=4)
    net = models.create("small", 5 + recipe.objective.reject)
    seen = []
    net.head.register_forward_hook(lambda head, given, out: seen.append(len(out)))
    x, o = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    out = forward(net, recipe, x, o if recipe.objective.outliers else None, Draw(0.5))
    terms = losses(recipe.objective, out, torch.tensor([0, 1, 2, 3]), 0.5)
    named = ("ce", "expose", "entropy", "energy", "ring", "mix", "consistency")
    assert set(terms) == {name for name in named if getattr(recipe.objective, name)}
    assert all(len(rows) == 4 for parts in terms.values() for rows in parts)
    assert sum(seen) == (8 if recipe.objective.mixer == "hidden" else recipe.images_per_step)
    sum(total(terms, "per-group-mean", 0).values()).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_separate_forwards_have_their_own_batch_statistics():  # property 12
    x, o = torch.randn(8, 3, 16, 16), torch.randn(8, 3, 16, 16) + 2
    means = []
    for mode in ("joint", "separate"):
        net = models.create("small", 5).train()
        forward(net, Recipe(METHODS["mixoe"], batch=8, batch_outliers=8, forward_mode=mode), x, o, Draw(0.5))  # type: ignore[arg-type]
        norm = next(m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))
        means.append((norm.running_mean.clone(), norm.num_batches_tracked.item()))
    assert not torch.allclose(means[0][0], means[1][0])
    assert [count for _, count in means] == [1, 2]


def test_logit_mixing_is_bounded_confidence():
    """The optimum of the mix term at flat outliers and Beta(1, 1), K = 10: a gap of about 4.85 (MSP .934)."""
    lams = torch.linspace(0.0005, 0.9995, 1000)
    gaps = torch.linspace(3, 7, 401)
    classes = 10
    z = torch.zeros(len(gaps), classes)
    z[:, 0] = gaps
    mean = torch.zeros(len(gaps))
    for lam in lams.tolist():
        target = mixed_target(torch.zeros(len(gaps), dtype=torch.int64), lam, z, "uniform")
        mean += soft_cross_entropy(lam * z, target) / len(lams)
    best = gaps[mean.argmin()].item()
    assert best == pytest.approx(4.85, abs=0.03)


def test_images_per_step_is_what_goes_forward():
    counts = {
        name: replace(default_recipe(name, False), batch=100, batch_outliers=100).images_per_step for name in METHODS
    }
    assert counts == dict.fromkeys(METHODS, 200) | {"ce": 100, "logitmixoe": 300}
    assert PRESETS["oe-cifar-tune"][1].images_per_step == 3 * 128


# field by field: epochs, lr, lr_min, milestones, nesterov, weight decay, batches, forward, order, views, terms
BASE = {"lr_min": 1e-6, "milestones": (), "nesterov": True, "weight_decay": 5e-4, "forward_mode": "joint",
        "reduction": "per-group-mean", "augment_id": "crop-flip", "augment_outliers": "crop-flip", "hard_from": 0,
        "optimizer": "sgd", "outlier_budget": 0}  # fmt: skip
OE = BASE | {"batch": 128, "batch_outliers": 256, "outlier_order": "window"}
STEPPED = BASE | {"lr_min": 0.0, "nesterov": False, "batch": 128, "batch_outliers": 128, "outlier_order": "shuffled"}
FINE = BASE | {"weight_decay": 1e-5, "batch": 32, "batch_outliers": 32, "forward_mode": "separate",
               "outlier_order": "shuffled", "epochs": 10, "lr": 0.001}  # fmt: skip
EXPECTED = {
    "msp-cifar": OE | {"epochs": 100, "lr": 0.1},
    "oe-cifar-tune": OE | {"epochs": 10, "lr": 0.001, "expose": 0.5, "target": "uniform"},
    "oe-cifar-scratch": OE | {"epochs": 100, "lr": 0.1, "expose": 0.5},
    "msp-svhn": OE | {"epochs": 20, "lr": 0.01, "augment_id": "none", "augment_outliers": "flip", "expose": 0.0},
    "msp-tinyimagenet": OE | {"epochs": 100, "lr": 0.1, "expose": 0.0},
    "msp-mnist": OE | {"epochs": 10, "lr": 0.01, "batch": 50, "batch_outliers": 100, "weight_decay": 0.0,
                       "augment_id": "none", "augment_outliers": "flip", "expose": 0.0},
    "oe-svhn-tune": OE | {"epochs": 5, "lr": 1e-4, "augment_id": "none", "augment_outliers": "flip", "expose": 0.5},
    "oe-svhn-scratch": OE | {"epochs": 20, "lr": 0.01, "augment_id": "none", "augment_outliers": "flip"},
    "oe-tinyimagenet-tune": OE | {"epochs": 10, "lr": 0.001, "batch_outliers": 180, "outlier_order": "sequential",
                                  "augment_outliers": "none"},
    "oe-mnist-tune": OE | {"epochs": 5, "lr": 0.01, "batch": 50, "batch_outliers": 100, "weight_decay": 0.0,
                           "augment_id": "none", "augment_outliers": "flip"},
    "oe-mnist-scratch": OE | {"epochs": 10, "lr": 0.01, "batch": 50, "batch_outliers": 100, "weight_decay": 0.0,
                              "augment_id": "none", "augment_outliers": "flip"},
    "energy-cifar10": OE | {"epochs": 10, "lr": 0.001, "energy": 0.1, "m_in": -23.0, "m_out": -5.0, "expose": 0.0},
    "energy-cifar100": OE | {"epochs": 10, "lr": 0.001, "energy": 0.1, "m_in": -27.0, "m_out": -5.0},
    "msp-resample": STEPPED | {"epochs": 100, "lr": 0.1, "milestones": (30, 60, 90)},
    "oe-resample": STEPPED | {"epochs": 50, "lr": 0.001, "milestones": (30,), "expose": 0.5},
    "entropy-resample": STEPPED | {"epochs": 50, "lr": 0.001, "milestones": (30,), "entropy": 0.5, "expose": 0.0},
    "entropic-vastlab": {"optimizer": "adam", "lr": 0.01, "epochs": 70, "batch": 128, "expose": 1.0, "ring": 0.0},
    "objectosphere-vastlab": {"optimizer": "adam", "lr": 0.01, "epochs": 70, "expose": 1.0, "ring": 1e-4, "xi": 50.0},
    "background-vastlab": {"optimizer": "adam", "lr": 0.01, "expose": 1.0, "target": "reject"},
    "msp-mixoe": FINE | {"epochs": 90},
    "mixoe-car": FINE | {"mixer": "linear", "beta": (1.0, 1.0), "mix": 5.0, "target": "uniform", "expose": 0.0},
    "mixoe-car-cutmix": FINE | {"mixer": "cutmix", "beta": (2.0, 2.0), "mix": 5.0},
    "oe-mixoe": FINE | {"batch_outliers": 64, "forward_mode": "joint", "expose": 1.0},
    "oe-m-mixoe": FINE | {"batch_outliers": 64, "forward_mode": "joint", "expose": 1.0, "hard_from": 50_000},
    "energy-mixoe": FINE | {"batch_outliers": 64, "forward_mode": "joint", "energy": 0.1, "m_in": -13.0, "m_out": -6.0},
    "mixoe-openood": FINE | {"batch": 128, "batch_outliers": 128, "weight_decay": 5e-4, "mixer": "cutmix",
                             "beta": (0.1, 1.0), "mix": 1.0},
    "msp-openmix": STEPPED | {"epochs": 200, "lr": 0.1, "milestones": (99, 149)},
    "openmix-cifar": STEPPED | {"epochs": 200, "lr": 0.1, "milestones": (99, 149), "mixer": "linear",
                                "beta": (10.0, 10.0), "mix": 1.0, "target": "reject", "expose": 0.0},
    "openmix-manifold-cifar": STEPPED | {"epochs": 200, "lr": 0.1, "milestones": (99, 149), "mixer": "hidden",
                                         "beta": (10.0, 10.0), "mix": 1.0, "target": "reject"},
    "openmix-imagenet": STEPPED | {"epochs": 90, "lr": 0.6, "milestones": (30, 60, 80), "weight_decay": 1e-4,
                                   "batch": 1536, "batch_outliers": 1536, "warmup": 5 / 90},
    "logitmixoe-cifar": OE | {"epochs": 10, "lr": 0.001, "batch_outliers": 128, "outlier_order": "shuffled",
                              "mixer": "logit", "beta": (1.0, 1.0), "mix": 1.0, "consistency": 1.0, "expose": 0.0,
                              "distance": "mse", "detach_target": False},
    "logitmixoe-fine": FINE | {"forward_mode": "joint", "mixer": "logit", "mix": 1.0, "consistency": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets_field_by_field(name):
    fields = asdict(preset(name)[1])
    fields |= fields.pop("objective")
    expected = EXPECTED[name]
    assert {key: fields[key] for key in expected} == expected


def test_bad_recipes_are_refused():
    with pytest.raises(UsageError, match="need a mixer"):
        Objective(mix=1.0)
    with pytest.raises(UsageError, match="must be equal"):
        Recipe(METHODS["mixoe"], batch=32, batch_outliers=64)
    with pytest.raises(UsageError, match="above 0"):
        Objective(beta=(0.0, 1.0))
    with pytest.raises(UsageError, match="openmix-cifar"):
        preset("openmx")
    with pytest.raises(UsageError, match="logitmixoe"):
        default_recipe("magic", False)
    with pytest.raises(UsageError, match="hidden"):
        Objective(mixer="hidden", mix=1.0, expose=0.5)
    with pytest.raises(UsageError, match="forward-mode joint"):
        Recipe(METHODS["openmix-manifold"], forward_mode="separate")
    with pytest.raises(UsageError, match="finite and at least 0"):
        Objective(expose=-1.0)
    for wrong in ({"lr": float("nan")}, {"lr_min": 1.0}, {"label_smoothing": 2.0}, {"batch_outliers": 0}):
        with pytest.raises(UsageError, match=next(iter(wrong)).replace("_", "-")):
            Recipe(**wrong)


@pytest.mark.parametrize("kind", [Objective, Recipe, PretrainConfig])
def test_no_number_of_a_recipe_may_be_nan_or_infinite(kind):
    numbers = [name for name, value in vars(kind()).items() if isinstance(value, float)]
    assert "lr" in numbers or "xi" in numbers
    wrong = [(name, float(text)) for name in numbers for text in ("nan", "inf", "-inf")]
    if kind is Objective:
        wrong.append(("beta", (1.0, float("nan"))))
    for name, number in wrong:
        with pytest.raises(UsageError, match=rf"^{name.replace('_', '-')} .*: must be finite"):
            kind(**{name: number})


def test_a_seed_that_torch_cannot_take_is_refused():
    assert TrainConfig(seed=2**63 - 1).seed == 2**63 - 1
    with pytest.raises(UsageError, match=r"seed 9223372036854775808: must be below 2\^63"):
        TrainConfig(seed=2**63)
    with pytest.raises(UsageError, match=r"long-tail nan: must be finite"):
        TrainConfig(long_tail=float("nan"))


def test_consistency_counts_under_every_mixer_of_images():
    for mixer in ("linear", "cutmix"):
        recipe = Recipe(Objective(mixer=mixer, mix=1.0, consistency=1.0), batch=4, batch_outliers=4)
        out = forward(
            models.create("small", 5), recipe, torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16), Draw(0.5)
        )
        assert set(losses(recipe.objective, out, torch.tensor([0, 1, 2, 3]), 0.5)) == {"ce", "mix", "consistency"}


def test_a_small_id_set_shrinks_both_batches():
    fitted = Recipe(METHODS["mixoe"], batch=128, batch_outliers=128).fitted(50)
    assert (fitted.batch, fitted.batch_outliers) == (50, 50)
    assert Recipe(METHODS["oe"], batch=100, batch_outliers=200).fitted(50).batch_outliers == 100
    assert Recipe().fitted(5000) == Recipe()
