"""DDP and FSDP2 in a group of one process give what the model gives alone: gloo on a CPU, NCCL on a GPU."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from beit_fast import BeitConfig, BeitForMaskedImageModeling
from beit_fast.train.cuda_graph import CapturedStep, CudaRecorder
from beit_fast.train.distributed.parallel import parallelise, shard, whole
from beit_fast.train.distributed.world import World


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, tmp_path) -> Iterator[torch.device]:
    """Where the group of one process works."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    found = torch.device(request.param, 0 if request.param == "cuda" else None)
    backend = "nccl" if request.param == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield found
    dist.destroy_process_group()


def model_and_batch(device):
    torch.manual_seed(0)
    config = BeitConfig.from_preset("tiny", depth=3, width=48, num_heads=3, image_size=64, vocab_size=60)
    mask = (torch.arange(16) % 3 == 0).repeat(4, 1)
    inputs = torch.randn(4, 3, 64, 64), mask, torch.randint(0, 60, (4, 16))
    known = {"masked_indices": mask.flatten().nonzero().squeeze(1).to(device)}
    return BeitForMaskedImageModeling(config).to(device), tuple(x.to(device) for x in inputs), known


def wrapped(kind, model, device):
    """As on several processes: with one, `parallelise` would leave the model as it is."""
    blocks = list(model.layers())
    if kind == "fsdp2":
        return shard(model, blocks, World(0, 1, device))
    return parallelise(model, blocks, World(0, 2, device), "ddp", accumulation=1)


def assert_same_gradients(alone, model):
    for (name, expected), (_, found) in zip(alone.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(whole(found.grad), expected.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_loss_and_gradients(device, kind):
    model, inputs, known = model_and_batch(device)
    alone = copy.deepcopy(model)
    expected = alone(*inputs, **known).loss
    expected.backward()
    training = wrapped(kind, model, device)
    loss = training(*inputs, **known).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=0)
    assert_same_gradients(alone, model)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_ddp_in_a_cuda_graph(device):
    model, inputs, known = model_and_batch(device)
    alone = copy.deepcopy(model)
    expected = alone(*inputs, **known).loss
    expected.backward()
    recorder = CudaRecorder(device)
    with recorder.on_its_stream():
        ddp = wrapped("ddp", model, device)

    def step(images):
        model.zero_grad(set_to_none=False)
        loss = ddp(images, *inputs[1:], **known).loss
        loss.backward()
        return loss.detach()

    captured = CapturedStep(step, device, 12, recorder)
    for _ in range(14):
        loss = captured(inputs[0])
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    assert_same_gradients(alone, model)
