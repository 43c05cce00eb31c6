"""BEiT v2's tokenizer against plain formulas in float64, its codes against a loop over features."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from beit_fast.tokenizers import TokenizerError, load_tokenizer
from beit_fast.tokenizers.vqkd import CosineQuantizer, VqkdTokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Hashes are kept here, not in the cache of the user who runs the tests."""
    monkeypatch.setenv("BEIT_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))


D, K, P, GRID, CODE, TEACHER = 128, 64, 8, 3, 6, 10


def make(vocab_size=40, decoder_depth=1):
    torch.manual_seed(0)
    model = VqkdTokenizer(vocab_size, CODE, TEACHER, D, 2, decoder_depth, GRID, P)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "_embed", "cls_token")):
                parameter.normal_(std=0.3)
            elif "task_layer" in name or "patch_embed" in name:
                parameter.normal_(std=0.2)
        model.quantize.codes.copy_(F.normalize(torch.randn(vocab_size, CODE), dim=1))
    return model


def transformer(w, part, x, patch):
    """The patch tokens of a plain Vision Transformer in float64, normalised."""
    x = F.conv2d(x, w[f"{part}.patch_embed.proj.weight"], w[f"{part}.patch_embed.proj.bias"], stride=patch)
    x = torch.cat((w[f"{part}.cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)), 1)
    x = x + w[f"{part}.pos_embed"]
    B, N, _ = x.shape
    block = 0
    while f"{part}.blocks.{block}.norm1.weight" in w:
        p = {n.removeprefix(f"{part}.blocks.{block}."): t for n, t in w.items()}
        y = F.layer_norm(x, (D,), p["norm1.weight"], p["norm1.bias"], 1e-6)
        bias = torch.cat((p["attn.q_bias"], torch.zeros(D, dtype=x.dtype), p["attn.v_bias"]))
        q, k, v = F.linear(y, p["attn.qkv.weight"], bias).reshape(B, N, 3, D // K, K).permute(2, 0, 3, 1, 4)
        y = ((q * K**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        x = x + F.linear(y.transpose(1, 2).reshape(B, N, D), p["attn.proj.weight"], p["attn.proj.bias"])
        y = F.layer_norm(x, (D,), p["norm2.weight"], p["norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, p["mlp.fc1.weight"], p["mlp.fc1.bias"]))
        x = x + F.linear(y, p["mlp.fc2.weight"], p["mlp.fc2.bias"])
        block += 1
    return F.layer_norm(x[:, 1:], (D,), w[f"{part}.fc_norm.weight"], w[f"{part}.fc_norm.bias"], 1e-6)


def head(w, name, x):
    x = torch.tanh(F.linear(x, w[f"{name}.0.weight"], w[f"{name}.0.bias"]))
    return F.linear(x, w[f"{name}.2.weight"], w[f"{name}.2.bias"])


def plain(w, images, target, quantize):
    """Losses of each image, float64, and the ids."""
    z = head(w, "encode_task_layer", transformer(w, "encoder", images * 2 - 1, P))
    z = z / z.norm(dim=-1, keepdim=True)
    codes = w["quantize.embedding.weight"]
    ids = (z[..., None, :] - codes).square().sum(-1).argmin(-1)
    hard = codes[ids].detach()
    commitment = (z - hard).square().sum((1, 2)) / z[0].numel()
    passed = z + (hard - z).detach() if quantize else z
    x = passed.transpose(1, 2).reshape(len(z), CODE, GRID, GRID)
    x = head(w, "decode_task_layer", transformer(w, "decoder", x, 1))
    cosine = (x * target).sum(-1) / (x.norm(dim=-1) * target.norm(dim=-1))
    return (1 - cosine).mean(1), commitment * quantize, ids


@pytest.mark.parametrize("quantize", [False, True])
def test_losses_and_every_gradient_equal_the_formula(quantize):
    model = make().train()
    images, target = torch.rand(3, 3, GRID * P, GRID * P), torch.randn(3, GRID**2, TEACHER)
    w = {name: t.double().requires_grad_(t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}
    w = {name: t.detach().requires_grad_(t.requires_grad) for name, t in w.items()}
    distillation, commitment, ids = plain(w, images.double(), target.double(), quantize)
    ours = model(images, target, quantize)
    for a, b in zip(ours, (distillation, commitment), strict=True):
        torch.testing.assert_close(a.double(), b.detach(), rtol=1e-6, atol=1e-6)
    (ours[0] + ours[1]).sum().backward()
    (distillation + commitment).sum().backward()
    for name, parameter in model.named_parameters():
        expected = w[name].grad
        assert parameter.grad is not None
        assert (parameter.grad - expected).norm() <= 1e-5 * expected.norm() + 1e-8, name
    rows, kept = model.take_recent()
    assert len(rows) == 3 * GRID**2
    assert model.recent == []
    if quantize:
        assert torch.equal(kept.view_as(ids), ids)
        assert torch.equal(model.eval().encode(images).flatten(1), ids)


def test_features_of_tokens_are_what_the_decoder_makes_of_their_codes():
    model = make().eval()
    images, target = torch.rand(2, 3, GRID * P, GRID * P), torch.randn(2, GRID**2, TEACHER)
    features = model.decode_features(model.encode(images))
    loss = 1 - F.cosine_similarity(features, target, dim=-1).mean(1)
    torch.testing.assert_close(loss, model(images, target, True)[0].detach(), rtol=1e-5, atol=1e-6)


def test_of_equal_codes_the_first_wins():
    quantizer = CosineQuantizer(7, 2)
    quantizer.codes.copy_(
        F.normalize(torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0], [-1, 0], [0, 1], [-1, 0]]), dim=1)
    )
    assert quantizer.nearest(torch.tensor([[0.0, 1], [1, 0], [-1, 0]])).tolist() == [1, 0, 4]


def loop_update(codes, counts, z, ids, decay):
    """The moving averages of one global batch, code by code."""
    codes, counts = codes.clone(), counts.clone()
    for k in range(len(codes)):
        won = z[ids == k]
        counts[k] = decay * counts[k] + (1 - decay) * len(won)
        if len(won):
            mean = sum(won) / len(won)
            codes[k] = decay * codes[k] + (1 - decay) * mean / mean.norm()
            codes[k] /= codes[k].norm()
    return codes, counts


def loop_kmeans(z, codes, rounds):
    for _ in range(rounds):
        ids = torch.stack([(codes @ row).argmax() for row in z])
        codes = torch.stack([F.normalize(z[ids == k].sum(0), dim=0) if (ids == k).any() else codes[k]
                             for k in range(len(codes))])  # fmt: skip
    return codes


RANKS = """
import os, sys
import torch, torch.distributed as dist
from beit_fast.tokenizers.vqkd import CosineQuantizer

def work(rank, world, folder):
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(7)  # as the engine: the same on every rank
    quantizer = CosineQuantizer(12, 4)
    batches = torch.load(f"{folder}/batches.pt")  # (steps, P, d)
    mine = batches.chunk(world, dim=1)[rank]
    quantizer.initialise(mine[0], rounds=3)
    states = []
    for z in mine:
        quantizer.update(z, quantizer.nearest(z), 0.9)
        states.append({n: t.clone() for n, t in quantizer.state_dict().items()})
    torch.save(states, f"{folder}/{world}_{rank}.pt")

torch.set_num_threads(1)
folder = sys.argv[1]
for world in (1, 2):
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            try:
                work(rank, world, folder)
                os._exit(0)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * world
"""


def test_moving_averages_are_those_of_a_loop_and_the_same_on_two_ranks(tmp_path):
    torch.manual_seed(3)
    centres = F.normalize(torch.randn(9, 4), dim=1)
    at = torch.stack([torch.randint(n, (80,)) for n in (9, 9, 4)])  # at last some codes are hit by nothing
    batches = F.normalize(centres[at] + 0.3 * torch.randn(3, 80, 4), dim=2)
    torch.save(batches, tmp_path / "batches.pt")
    subprocess.run([sys.executable, "-c", RANKS, str(tmp_path)], check=True, timeout=120)
    one = torch.load(tmp_path / "1_0.pt")
    for rank in range(2):
        for a, b in zip(one, torch.load(tmp_path / f"2_{rank}.pt"), strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)

    torch.manual_seed(7)
    codes = loop_kmeans(batches[0].double(), batches[0].double()[torch.randperm(80)[:12]], 3)
    counts = torch.zeros(12, dtype=torch.float64)
    unused = 0
    for z, state in zip(batches.double(), one, strict=True):
        ids = torch.stack([(codes - row).square().sum(1).argmin() for row in z])
        unused += 12 - len(ids.unique())
        codes, counts = loop_update(codes, counts, z, ids, 0.9)
        torch.testing.assert_close(state["embedding.weight"].double(), codes, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(state["cluster_size"].double(), counts, rtol=1e-6, atol=1e-6)
    assert float(one[-1]["embedding.initted"]) == 1
    assert unused, "no code was without a hit: the rule for those is not tested"


def test_more_codes_than_features_start_on_some_of_them_again():
    torch.manual_seed(0)
    quantizer, z = CosineQuantizer(50, 3), F.normalize(torch.randn(20, 3), dim=1)
    assert not quantizer.codes.any()
    quantizer.initialise(z)
    torch.testing.assert_close(quantizer.codes.norm(dim=1), torch.ones(50))
    assert float(quantizer.used_share()) == 0
    quantizer.update(z, quantizer.nearest(z), 0.99)
    assert 5 <= round(50 * float(quantizer.used_share())) <= 20


BLOCK = 2 * 2 * 768 + 768 * 3 * 768 + 2 * 768 + 768 * 768 + 768 + 2 * 768 * 3072 + 3072 + 768
ENCODER = 16 * 16 * 3 * 768 + 768 + 768 + 197 * 768 + 12 * BLOCK + 2 * 768


def test_parameters_of_the_released_layout():
    """By hand; and what the released files call their tensors."""
    with torch.device("meta"):
        model = VqkdTokenizer()
    decoder = 32 * 768 + 768 + 768 + 197 * 768 + 3 * BLOCK + 2 * 768
    heads = 2 * (768 * 768 + 768) + 768 * 32 + 32 + 768 * 512 + 512
    assert sum(p.numel() for p in model.encoder.parameters()) == ENCODER == 85_789_440
    assert sum(p.numel() for p in model.parameters()) == ENCODER + decoder + heads
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {n: s for n, s in shapes.items() if n.startswith("quantize.")} == {
        "quantize.cluster_size": (8192,), "quantize.embedding.weight": (8192, 32),
        "quantize.embedding.cluster_size": (8192,), "quantize.embedding.embed_avg": (8192, 32),
        "quantize.embedding.initted": (1,),
    }  # fmt: skip
    heads_there = {f"{side}code_task_layer.{i}.{kind}" for side in ("en", "de") for i in (0, 2)
                   for kind in ("weight", "bias")}  # fmt: skip
    assert {name for name in shapes if "task_layer" in name} == heads_there
    of_a_block = {"norm1.weight", "norm1.bias", "attn.q_bias", "attn.v_bias", "attn.qkv.weight", "attn.proj.weight",
                  "attn.proj.bias", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight",
                  "mlp.fc2.bias"}  # fmt: skip
    outside = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "fc_norm.weight",
               "fc_norm.bias"}  # fmt: skip
    for part, depth in (("encoder", 12), ("decoder", 3)):
        expected = {f"{part}.blocks.{i}.{name}" for i in range(depth) for name in of_a_block}
        expected |= {f"{part}.{name}" for name in outside}
        assert {name for name in shapes if name.startswith(f"{part}.")} == expected
    assert shapes["decoder.patch_embed.proj.weight"] == (768, 32, 1, 1)


@torch.no_grad()
def test_initial_weights():
    model = VqkdTokenizer(16, 32, 64, 192, 3, 2, 2, 16)
    for part in (model.encoder, model.decoder):
        for index, block in enumerate(part.blocks, start=1):
            assert float(block.attn.qkv.weight.std()) == pytest.approx(0.02, rel=0.05)
            for layer in (block.attn.proj, block.mlp.fc2):
                assert float(layer.weight.std()) == pytest.approx(0.02 / (2 * index) ** 0.5, rel=0.05)
    for layers in (model.encode_task_layer, model.decode_task_layer):
        assert float(layers[0].weight.std()) == pytest.approx(0.02, rel=0.05)
        assert not layers[2].bias.any()


@pytest.mark.parametrize("form", ["safetensors", "model", "state_dict"])
def test_files_round_trip(tmp_path, form):
    """Released files nest the state and keep parts of the teacher; ours are plain."""
    model = make(decoder_depth=2).eval()
    images = torch.rand(2, 3, GRID * P, GRID * P)
    if form == "safetensors":
        path = tmp_path / "tokenizer.safetensors"
        save_file(model.state_dict(), path)
    else:
        path = tmp_path / "vqkd.pth"
        teacher = {"teacher_model.visual.proj": torch.zeros(3), "scaling_layer.shift": torch.zeros(1), "loss.x": images}
        torch.save({form: model.state_dict() | teacher, "epoch": 3}, path)
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, VqkdTokenizer)
    assert (tokenizer.vocab_size, tokenizer.stride, len(tokenizer.sha256)) == (40, P, 64)
    assert tokenizer.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in tokenizer.state_dict().items())
    ids = tokenizer.encode(images)
    assert torch.equal(ids, model.encode(images))
    assert ids.shape == (2, GRID, GRID)
    mask = torch.rand(2, GRID, GRID) < 0.5
    assert torch.equal(tokenizer.encode(images, mask), ids[mask])
    assert tokenizer.encode(torch.rand(1, 3, 4 * P, 2 * P)).shape == (1, 4, 2)


def test_what_cannot_be_done_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="width 100 is not a multiple of 64"):
        VqkdTokenizer(width=100)
    model = make()
    with pytest.raises(TokenizerError, match=r"stand for a teacher's features \(decode_features\); take `dalle`"):
        model.decode(torch.zeros(1, GRID, GRID, dtype=torch.int64))
    state = model.state_dict()
    for name, message in (
        ("encoder.blocks.1.norm2.bias", "encoder.blocks.1.norm2.bias is missing"),
        ("encoder.pos_embed", "required tensor is malformed"),
        ("decode_task_layer.0.bias", "decode_task_layer.0.bias is missing"),
    ):
        path = tmp_path / f"without_{name}.safetensors"
        save_file({n: t for n, t in state.items() if n != name}, path)
        with pytest.raises(TokenizerError, match=message):
            load_tokenizer(path)


def test_multiply_adds_by_hand():
    n, tokens = GRID**2, GRID**2 + 1
    block = 12 * tokens * D * D + 2 * tokens**2 * D
    expected = n * 3 * P * P * D + 2 * block + n * (D * D + D * CODE)
    model = make().eval()
    assert model.multiply_adds(GRID * P, GRID * P, positions=0) == expected
    assert model.multiply_adds(GRID * P, GRID * P) == expected + n * 40 * CODE


def test_half_precision_moves_few_tokens():
    model = make(vocab_size=200).eval()
    images = torch.rand(16, 3, GRID * P, GRID * P)
    exact = model.encode(images)
    rounded = model.to_precision(torch.bfloat16).encode(images)
    assert model.encode_task_layer[0].weight.dtype == torch.float32
    assert 0.8 < float((rounded == exact).float().mean()) <= 1
