"""Training steps that several trainers share: the same bytes as one trainer's, however many there are."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist

from miner import demo
from miner.config import Game
from miner.errors import MinerError
from miner.rays import LostError
from trainers import together
from trainers.actor import Trainer
from trainers.data import IdSet
from trainers.together import Group, own_positions, part_sizes

BATCH, STEPS = 30, 4


@pytest.fixture(scope="module")
def pool() -> np.ndarray:
    return demo.pool_arrays()[0][: BATCH * STEPS]


@pytest.fixture
def flipped(digits: IdSet) -> IdSet:
    """Mirroring too is drawn for whole batches."""
    return dataclasses.replace(digits, flip=True)


def trainers(id_set: IdSet, count: int, parts: int) -> list[Trainer]:
    """``count`` trainers of one group."""
    found = [Trainer("small", id_set, seed=1, game=Game(batch=BATCH, parts=parts)) for _ in range(count)]
    if count > 1:
        where = found[0].meet()
        at_once([lambda rank=rank: found[rank].join(rank, count, where) for rank in range(count)])
    return found


def at_once(calls: list) -> list:
    with ThreadPoolExecutor(len(calls)) as threads:
        return [job.result() for job in [threads.submit(call) for call in calls]]


def train(group: list[Trainer], pool: np.ndarray, parts: int, factors: np.ndarray | None = None) -> list:
    def of(rank: int) -> tuple[list[float], np.ndarray]:
        own = own_positions(BATCH, STEPS, parts, rank, len(group))
        part = None if factors is None else factors[own]
        return group[rank].train(0, 0, np.arange(len(own)), part, pool[own])

    return at_once([lambda rank=rank: of(rank) for rank in range(len(group))])


@pytest.mark.parametrize(("batch", "parts"), [(30, 1), (30, 4), (7, 7), (128, 8)])
def test_everybody_has_positions_of_their_own(batch: int, parts: int) -> None:
    sizes = part_sizes(batch, parts)
    assert sum(sizes) == batch
    assert 1 <= min(sizes) <= max(sizes) <= min(sizes) + 1
    for world in range(1, parts + 1):
        found = [own_positions(batch, 2, parts, rank, world) for rank in range(world)]
        assert sorted(np.concatenate(found).tolist()) == list(range(2 * batch))
        assert all(len(own) % 2 == 0 and own[0] + batch == own[len(own) // 2] for own in found)


@pytest.mark.parametrize("weighted", [False, True])
def test_any_number_of_trainers_ends_in_the_same_bytes(flipped: IdSet, pool: np.ndarray, weighted: bool) -> None:
    factors = np.linspace(0.2, 3, len(pool)) if weighted else None
    alone = trainers(flipped, 1, parts=4)
    expected = train(alone, pool, 4, factors)[0]
    for world in (2, 3):
        group = trainers(flipped, world, parts=4)
        for (entropies, losses), member in zip(train(group, pool, 4, factors), group, strict=True):
            assert entropies == expected[0]
            assert losses.tobytes() == expected[1].tobytes()
            assert member.state() == alone[0].state()


def test_parts_add_up_to_the_joint_step(flipped: IdSet, pool: np.ndarray) -> None:
    factors = np.linspace(0.2, 3, len(pool))
    whole, cut = trainers(flipped, 1, parts=1)[0], trainers(flipped, 1, parts=4)[0]
    (entropy, loss), (entropy_cut, loss_cut) = (
        train([member], pool, parts, factors)[0] for member, parts in ((whole, 1), (cut, 4))
    )
    np.testing.assert_allclose(entropy_cut, entropy, rtol=1e-4)
    np.testing.assert_allclose(loss_cut, loss, rtol=1e-3, atol=1e-4)
    for a, b in zip(whole.net.parameters(), cut.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert whole.state() != trainers(flipped, 1, parts=1)[0].state()


def test_a_diverged_step_changes_nothing(digits: IdSet, pool: np.ndarray) -> None:
    group = trainers(digits, 2, parts=2)
    before = group[0].state()
    with pytest.raises(MinerError, match="loss became"):
        train(group, pool, 2, np.full(len(pool), np.inf))
    assert group[0].state() == before == group[1].state()


def test_a_member_that_is_gone_is_a_loss(digits: IdSet, pool: np.ndarray) -> None:
    group = trainers(digits, 2, parts=2)
    group[1].group = Group()  # what its process held is gone, and its connections with it
    own = own_positions(BATCH, STEPS, 2, 0, 2)
    with pytest.raises(LostError, match="in a training step"):
        group[0].train(0, 0, np.arange(len(own)), None, pool[own])


def test_members_meet_on_this_nodes_address_only() -> None:
    with together.listen() as meeting:
        assert meeting.getsockname()[0] == "127.0.0.1"


def test_members_on_gpus_need_no_index_of_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sees one GPU alone, as "cuda"; gloo stands in for NCCL here."""

    class Nccl(dist.ProcessGroupGloo):
        @staticmethod
        def Options() -> object:
            options = dist.ProcessGroupGloo._Options()
            options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            return options

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Nccl, raising=False)
    meeting, members = together.listen(), [Group(rank, 2) for rank in range(2)]
    where = meeting.getsockname()
    device = torch.device("cuda")
    at_once([lambda m=m: m.meet(where, device, meeting if m.rank == 0 else None) for m in members])
    found = at_once([lambda m=m: m.gather(torch.full((1, 3), float(m.rank)), 2) for m in members])
    assert [[row.tolist() for row in rows] for rows in found] == [[[0.0] * 3, [1.0] * 3]] * 2
