"""A checkpoint of any run continues at any world size: its weights, whole or split, and the samples that are left."""

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from beit_fast.train.checkpoint.format import save_checkpoint, verify
from beit_fast.train.checkpoint.resharding import own_parts, restore_tensors, save_sharded, whole_tensors
from beit_fast.train.config import RunConfig
from beit_fast.train.schedules import RunSchedule

WORLDS = st.integers(1, 4)
SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=3)


def as_rank(rank, size, action):
    """What `action(mesh)` gives on one rank of a process group in which nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        return action(init_device_mesh("cpu", (size,)))
    finally:
        dist.destroy_process_group()


def share(tensor, rank, size):
    """The rows of a rank by hand: as many for each, rounded up, so that the last ranks may have fewer or none."""
    rows = math.ceil(len(tensor) / size)
    return tensor[rank * rows : (rank + 1) * rows].clone()


def split(tensors, mesh, rank, size, fill=None):
    """Each as FSDP2 holds it on this rank; the last one whole."""
    *names, last = tensors
    made = {}
    for name in names:
        local = share(tensors[name], rank, size)
        if fill is not None:
            local.fill_(fill)
        whole = tensors[name]
        made[name] = DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )
    return made | {last: tensors[last].clone() if fill is None else torch.full_like(tensors[last], fill)}


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(shapes=SHAPES, before=WORLDS, after=WORLDS, was_split=st.booleans(), is_split=st.booleans())
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_weights_move_between_all_worlds(tmp_path_factory, shapes, before, after, was_split, is_split):
    root = tmp_path_factory.mktemp("checkpoints")
    tensors = {f"t{n}": torch.randn(shape) for n, shape in enumerate([*shapes, (2, 2)])}
    if was_split:
        for rank in reversed(range(before)):  # rank 0 commits what the others have written

            def save(mesh, rank=rank):
                parts = own_parts(split(tensors, mesh, rank, before), rank)
                return save_sharded(root, 7, {"model": parts}, {}, 3, rank, before, lambda: None)

            if rank:
                as_rank(rank, before, save)
            else:
                saved = verify(as_rank(0, before, save))
    else:
        saved = verify(save_checkpoint(root, 7, {"model": tensors}, {}, 3))
    assert (saved.step, saved.is_sharded("model")) == (7, was_split)
    whole = dict(whole_tensors(saved, "model"))
    assert whole.keys() == tensors.keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in tensors.items())
    for rank in range(after):

        def restore(mesh, rank=rank):
            targets = split(tensors, mesh, rank, after, fill=-7.0)
            restore_tensors(saved, "model", targets, "weights")
            return {name: t.to_local() if isinstance(t, DTensor) else t for name, t in targets.items()}

        if is_split:
            found = as_rank(rank, after, restore)
            *names, last = tensors
            expected = {name: share(tensors[name], rank, after) for name in names} | {last: tensors[last]}
        else:
            found, expected = {name: torch.zeros_like(t) for name, t in tensors.items()}, tensors
            restore_tensors(saved, "model", found, "weights")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(12, 60), saved_at=st.integers(0, 12), sizes=st.tuples(WORLDS, WORLDS),
    per_device=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    batches=st.sampled_from([(12, 12), (12, 24), (24, 12)]),
)  # fmt: skip
def test_the_samples_that_are_left_are_read_once_by_one_rank(samples, saved_at, sizes, per_device, batches):
    """Of steps before and after a checkpoint, at two world sizes: the epoch's order, from where the run stood."""
    samples = max(samples, *batches)
    runs = [
        RunConfig(batch_size=batch, batch_per_device=each, epochs=50, change_batch_size=True)
        for batch, each in zip(batches, per_device, strict=True)
    ]

    def positions(schedule, first, last, size):
        """Of each step, in the order of the ranks."""
        found = []
        for step in range(first, last):
            parts = [r for rank in range(size) for r in schedule.requests(step, step + 1, rank, size)]
            assert len({r.epoch for r in parts}) == 1
            assert all(len(r.positions) <= schedule.config.batch_per_device for r in parts)
            found.append((parts[0].epoch, [int(p) for r in parts for p in r.positions]))
        return found

    start = RunSchedule(runs[0], samples)
    seen = positions(start, 0, saved_at, sizes[0])
    then = RunSchedule.after(runs[1], samples, saved_at, start.state(saved_at))
    seen += positions(then, saved_at, saved_at + 6, sizes[1])
    if batches[0] == batches[1]:
        assert then == RunSchedule(runs[1], samples)
    begin = saved_at + then.data_offset
    assert begin == round(saved_at / (samples // batches[0]) * (samples // batches[1]))
    counts = [(step, batches[0]) for step in range(saved_at)] + [(begin + n, batches[1]) for n in range(6)]
    for (epoch, found), (step, batch) in zip(seen, counts, strict=True):
        expected, within = divmod(step, samples // batch)
        assert (epoch, found) == (expected, list(range(within * batch, (within + 1) * batch)))
