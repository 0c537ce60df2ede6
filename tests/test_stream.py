from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from denoiselab.data import Stream
from denoiselab.data.stream import Address

N, BATCH = 50, 24
SLICINGS = pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 3), (3, 2), (4, 6), (24, 1)])


def flat(batches: list[list[Address]]) -> list[Address]:
    return [address for batch in batches for address in batch]


def take(stream: Stream, count: int) -> list[list[Address]]:
    return list(islice(stream, count))


def steps(count: int, world: int = 1, accumulation: int = 1, **arguments) -> list[list[list[Address]]]:
    """Per optimizer step, the micro-batches of every rank in the order micro, rank."""
    arguments = {"n": N, "batch_size": BATCH, "seed": 0, **arguments}
    ranks = [
        take(Stream(rank=rank, world=world, accumulation=accumulation, **arguments), count * accumulation)
        for rank in range(world)
    ]
    return [
        [ranks[rank][step * accumulation + micro] for micro in range(accumulation) for rank in range(world)]
        for step in range(count)
    ]


@SLICINGS
def test_the_order_does_not_depend_on_ranks_and_accumulation(world, accumulation):
    """Laid end to end, the slices of a step are the step of a single process, address by address."""
    whole = [flat(step) for step in steps(7)]
    sliced = steps(7, world, accumulation)
    assert [flat(step) for step in sliced] == whole
    assert {len(micro) for step in sliced for micro in step} == {BATCH // (world * accumulation)}


@SLICINGS
def test_slices_of_a_step_are_disjoint(world, accumulation):
    for step in steps(4, world, accumulation):
        assert len(set(flat(step))) == BATCH


@pytest.mark.parametrize(("n", "batch_size"), [(50, 24), (7, 24), (24, 24), (1, 3), (50, 1)])
def test_each_epoch_visits_each_sample_once(n, batch_size):
    """Over batches that run across epochs' ends, and epochs shorter than a batch; nothing is dropped."""
    epochs = 5
    count = -(-epochs * n // batch_size)
    order = flat(flat(steps(count, n=n, batch_size=batch_size)))[: epochs * n]
    assert [epoch for epoch, _ in order] == [epoch for epoch in range(epochs) for _ in range(n)]
    for epoch in range(epochs):
        assert sorted(index for e, index in order if e == epoch) == list(range(n))


def test_epochs_have_orders_of_their_own():
    stream = Stream(200, 10, seed=0)
    orders = [stream.order(epoch) for epoch in range(4)]
    for i in range(4):
        assert not torch.equal(orders[i], torch.arange(200))
        for j in range(i):
            assert (orders[i] == orders[j]).sum() < 10
    assert torch.equal(stream.order(0), orders[0])


def test_every_place_in_an_epoch_is_as_likely():
    """The first sample of 3,000 epochs of six."""
    stream = Stream(6, 1, seed=0)
    counts = torch.bincount(torch.tensor([stream.order(epoch)[0].item() for epoch in range(3000)]), minlength=6)
    assert ((counts - 500).double().square().sum() / 500) < 25  # chi-square of 5 degrees of freedom, p = 1e-4


@SLICINGS
@pytest.mark.parametrize("start", [1, 2, 5, 100])
def test_a_stream_continues_where_it_stopped(world, accumulation, start):
    assert steps(3, world, accumulation, start=start) == steps(start + 3, world, accumulation)[start:]


def test_a_stream_is_the_same_each_time_it_is_read():
    stream = Stream(N, BATCH, seed=0, start=2)
    assert take(stream, 6) == take(stream, 6)
    torch.manual_seed(1)
    assert take(Stream(N, BATCH, seed=0, start=2), 6) == take(stream, 6)


def test_seeds_have_orders_of_their_own():
    first, second = (flat(take(Stream(N, BATCH, seed=seed), 4)) for seed in (0, 1))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 20


class Addresses(Dataset):
    """A data set whose samples are their addresses."""

    def __len__(self) -> int:
        return N

    def __getitems__(self, addresses: list[Address]) -> list[Address]:
        return addresses


def as_it_is(batch: list[Address]) -> list[Address]:
    return batch


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_processes_do_not_change_the_order(workers):
    stream = Stream(N, BATCH, seed=0, rank=1, world=2, accumulation=2, start=3)
    loader = DataLoader(Addresses(), batch_sampler=stream, collate_fn=as_it_is, num_workers=workers)
    batches = iter(loader)
    assert [next(batches) for _ in range(9)] == take(stream, 9)
    del batches
