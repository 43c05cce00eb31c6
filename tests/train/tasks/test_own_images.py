"""Pre-training that goes on from weights, on images of any channels: what starts it, what learns, what comes out."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast import Beit, BeitConfig, BeitForMaskedImageModeling
from beit_fast.data.arrays.statistics import measure, normalization_of
from beit_fast.data.sources import ArraySource, open_source
from beit_fast.models import convert_state_dict
from beit_fast.models.mim import pretrained_backbone
from beit_fast.tokenizers import load_tokenizer
from beit_fast.train import engine
from beit_fast.train.config import CheckpointConfig, LogConfig, OptimConfig
from beit_fast.train.distributed.world import World
from beit_fast.train.metrics import read_metrics
from beit_fast.train.tasks import finetune, pretrain, tokenizer
from beit_fast.train.tasks.adapters import LoraConfig, add_lora, merged
from beit_fast.train.tasks.start import StartingWeights, defaults_for, with_images_seen
from benchmarks.baselines.torchvision_stubs import make_torchvision_importable
from tests import images

make_torchvision_importable()  # peft imports transformers, which imports it

ARCHITECTURE = BeitConfig(image_size=32, patch_size=8, width=32, depth=2, num_heads=2)
CPU = World(0, 1, torch.device("cpu"))


def scan(label, rng):
    """12 bits in 16."""
    return images.scan(label, rng, (40, 48), 2000, 900, 100, most=4095)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Scans of 12 bits in 16-bit TIFFs, labelled ones, and weights of the released form."""
    root, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    images.write_scans(root, "scans", 16, 6, 4, rng, scan)
    torch.manual_seed(0)
    model = BeitForMaskedImageModeling(ARCHITECTURE)
    torch.save({"model": model.state_dict()}, root / "pt22k.pth")
    classifier = Beit(ARCHITECTURE.for_classification(5))
    torch.save({"model": classifier.state_dict()}, root / "ft22k.pth")
    return root


def config(place, folder, **changes):
    data = {"path": str(place / "scans"), "channels": 1, "value_range": (0.0, 4095.0), "normalization": "half",
            "threads": 1}  # fmt: skip
    values = {
        "output_dir": folder, "steps": 4, "batch_size": 4, "batch_per_device": 4, "eval_every": 2,
        "weights": str(place / "pt22k.pth"),
        "data": pretrain.DataConfig(**data),
        "model": pretrain.ModelConfig(image_size=32, patch_size=8, width=32, depth=2, num_heads=2),
        "masking": pretrain.MaskingConfig(num_masked=None),
        "tokenizer": pretrain.TokenizerConfig(name="demo"),
        "evaluation": pretrain.EvaluationConfig(knn=str(place / "labelled")),
        "optim": OptimConfig(lr=1e-3, warmup_steps=1),
        "checkpoint": CheckpointConfig(every_steps=2), "log": LogConfig(every_steps=1, progress="none"),
    }  # fmt: skip
    return pretrain.PretrainConfig(**(values | changes))


def built(configuration):
    task = pretrain.MaskedImageModeling(configuration)
    try:
        return task, task.build(CPU)
    finally:
        task.close()


def test_a_run_from_weights_measures_its_start_and_draws_it(place, tmp_path):
    assert engine.run(pretrain.MaskedImageModeling(config(place, tmp_path / "run"))).exit_code == 0
    lines = [line for line in read_metrics(tmp_path / "run/metrics.jsonl") if line["kind"] == "evaluation"]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert all(0 <= line[name] <= 100 for line in lines for name in ("knn_top1_percent", "probe_top1_percent"))
    # step 0 is the weights as they are
    _, start = built(config(place, tmp_path / "other"))
    views = pretrain.KnnEvaluation(
        str(place / "labelled"), 32, probe=True, mean=(0.5,), std=(0.5,), channels=1, value_range=(0.0, 4095.0)
    )
    expected = views.evaluate(pretrained_backbone(start), CPU, 4)
    views.close()
    assert {name: lines[0][name] for name in expected} == expected
    report = (tmp_path / "run/report.html").read_text()
    assert "knn top1 percent, starting weights" in report
    preprocessing = json.loads((tmp_path / "run/model/preprocessing.json").read_text())
    assert (preprocessing["channels"], preprocessing["value_range"], preprocessing["mean"]) == (1, [0.0, 4095.0], [0.5])
    # the patch embedding of one channel answers as that of three to grey (timm's rule)
    state = torch.load(place / "pt22k.pth")["model"]
    torch.testing.assert_close(start.patch_embed.proj.weight, state["patch_embed.proj.weight"].sum(1, keepdim=True))


@pytest.mark.parametrize("form", ["timm", "transformers", "transformers_v4"])
def test_weights_of_other_libraries_start_a_run(place, tmp_path, form):
    state = torch.load(place / "pt22k.pth")["model"]
    torch.save(convert_state_dict(state, to=form), tmp_path / "weights.pth")
    _, expected = built(config(place, tmp_path / "a"))
    _, found = built(config(place, tmp_path / "b", weights=str(tmp_path / "weights.pth")))
    state = found.state_dict()
    other = {name for name, tensor in expected.state_dict().items() if not torch.equal(tensor, state[name])}
    assert other == ({"mask_token"} if form == "timm" else set())  # timm's files have none


def test_the_head_stays_where_the_tokenizer_does(place, tmp_path):
    state = torch.load(place / "pt22k.pth")["model"]
    _, model = built(config(place, tmp_path / "a"))
    assert not torch.equal(model.lm_head.weight, state["lm_head.weight"])  # released heads speak DALL-E's tokens
    start, fresh = StartingWeights(str(place / "pt22k.pth")), BeitForMaskedImageModeling(ARCHITECTURE)
    dalle = load_tokenizer("random")
    dalle.name = "dalle"
    start.load(fresh, dalle, verbose=False)
    assert torch.equal(fresh.lm_head.weight, state["lm_head.weight"])
    run = tmp_path / "run"
    evaluation = pretrain.EvaluationConfig()
    engine.run(pretrain.MaskedImageModeling(config(place, run, evaluation=evaluation)))
    _, again = built(config(place, tmp_path / "b", weights=str(run)))
    trained = BeitForMaskedImageModeling.from_pretrained(run / "model")
    assert torch.equal(again.lm_head.weight, trained.lm_head.weight)
    other = config(place, tmp_path / "c", weights=str(run), tokenizer=pretrain.TokenizerConfig(name="random"))
    assert not torch.equal(built(other)[1].lm_head.weight, trained.lm_head.weight)


def test_fine_tuned_weights_start_only_where_that_is_asked_for(place, tmp_path):
    fine_tuned = config(place, tmp_path / "run", weights=str(place / "ft22k.pth"))
    with pytest.raises(
        ValueError, match=r"were fine-tuned to classify \(a head of 5 classes and a position"
    ) as failure:
        built(fine_tuned)
    assert "\n" not in str(failure.value)
    _, model = built(dataclasses.replace(fine_tuned, fine_tuned_weights=True))
    state = torch.load(place / "ft22k.pth")["model"]
    name = "blocks.1.attn.relative_position_bias_table"
    assert torch.equal(model.state_dict()[name], state[name])


def test_frozen_blocks_keep_their_weights(place, tmp_path):
    evaluation = pretrain.EvaluationConfig()
    frozen = config(place, tmp_path / "run", frozen_blocks=1, layer_decay=0.5, evaluation=evaluation)
    _, before = built(dataclasses.replace(frozen, output_dir=tmp_path / "other"))
    engine.run(pretrain.MaskedImageModeling(frozen))
    after = BeitForMaskedImageModeling.from_pretrained(tmp_path / "run/model").state_dict()
    changed = {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after[name])}
    assert not any(name.startswith(("blocks.0.", "patch_embed", "cls_token")) for name in changed)
    assert {"blocks.1.attn.qkv.weight", "lm_head.weight", "mask_token"} <= changed
    with pytest.raises(ValueError, match="--frozen-blocks is 3, the model has 2 blocks"):
        built(config(place, tmp_path / "x", frozen_blocks=3))
    with pytest.raises(ValueError, match="give --weights"):
        config(place, tmp_path / "x", frozen_blocks=1, weights=None)


def test_lora_trains_updates_and_merges_them(place, tmp_path):
    pytest.importorskip("peft")
    evaluation = pretrain.EvaluationConfig(knn=str(place / "labelled"))
    lora = config(place, tmp_path / "run", lora=LoraConfig(rank=2), evaluation=evaluation)
    assert engine.run(pretrain.MaskedImageModeling(dataclasses.replace(lora, max_steps=2))).exit_code == 0
    assert engine.run(pretrain.MaskedImageModeling(lora)).exit_code == 0  # continues from its checkpoint
    _, start = built(dataclasses.replace(lora, output_dir=tmp_path / "o", lora=LoraConfig()))
    before = start.state_dict()
    after = BeitForMaskedImageModeling.from_pretrained(tmp_path / "run/model")
    assert set(after.state_dict()) == set(before)
    changed = {name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before[name])}
    matrices = {f"blocks.{b}.{m}.weight" for b in (0, 1) for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert matrices <= changed
    assert changed - matrices <= {"lm_head.weight", "lm_head.bias", "mask_token", "norm.weight", "norm.bias"}
    for name in matrices:  # of rank 2 each
        difference = torch.linalg.svdvals(after.state_dict()[name].double() - before[name].double())
        assert difference[2:].max() < 1e-3 * difference[0] + 1e-7
    # a LoRA run is weights for others as it was merged
    _, model = built(config(place, tmp_path / "n", weights=str(tmp_path / "run")))
    assert torch.equal(model.blocks[0].attn.qkv.weight, after.blocks[0].attn.qkv.weight)


def test_the_fused_path_heeds_lora():
    pytest.importorskip("peft")
    torch.manual_seed(0)
    strong = dataclasses.replace(ARCHITECTURE, init_std=0.3, head_init_scale=1.0, layer_scale_init=1.0)
    model = Beit(strong.for_classification(3)).eval()
    images = torch.randn(2, 3, 32, 32)
    plain = model(images)
    assert model.blocks[0].can_fuse()
    add_lora(model, LoraConfig(rank=2))
    assert not model.blocks[0].can_fuse()
    torch.testing.assert_close(model(images), plain, atol=1e-5, rtol=0)  # updates begin at zero
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted = model(images)
    assert (adapted - plain).abs().max() > 1e-4
    whole = merged(model)
    assert whole.blocks[0].can_fuse()
    torch.testing.assert_close(whole(images), adapted, atol=2e-5, rtol=1e-4)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith(("head.", "fc_norm.")) for name in trained)
    assert "head.weight" in trained


def test_views_that_are_not_square(place, tmp_path):
    evaluation = pretrain.EvaluationConfig(knn=str(place / "labelled"), path=str(place / "scans"), images=4, pictures=1)
    model = pretrain.ModelConfig(image_size=(24, 40), patch_size=8, width=32, depth=2, num_heads=2)
    wide = config(place, tmp_path / "run", model=model, evaluation=evaluation)
    _, built_model = built(dataclasses.replace(wide, output_dir=tmp_path / "o"))
    assert built_model.config.grid == (3, 5)
    assert built_model.rel_pos_bias.relative_position_bias_table.shape[0] == 5 * 9 + 3
    assert wide.masking.of((3, 5)).num_masked == round(15 * 75 / 196)
    assert engine.run(pretrain.MaskedImageModeling(wide)).exit_code == 0
    assert list((tmp_path / "run/pictures").glob("reconstructions_*.png"))
    saved = BeitForMaskedImageModeling.from_pretrained(tmp_path / "run/model")
    assert saved.config.image_hw == (24, 40)


def test_a_masked_share_follows_the_grid_and_is_the_paper_s_at_its_grid():
    masking = pretrain.MaskingConfig(num_masked=None)
    assert (masking.of((14, 14)).num_masked, masking.of((14, 14)).min_num_patches) == (75, 16)
    assert masking.of((4, 4)).num_masked == 6
    assert pretrain.MaskingConfig().of((14, 14)) == masking.of((14, 14))


def test_statistics_are_those_of_the_pixels(place, tmp_path):
    source = open_source(place / "scans")
    found = measure(source, "scans", 1, (0.0, 4095.0))
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted((place / "scans").glob("*.tif"))]) / 4095
    np.testing.assert_allclose((found.mean[0], found.std[0]), (pixels.mean(), pixels.std()), rtol=1e-9)
    np.testing.assert_allclose((found.smallest[0], found.largest[0]), (4095 * pixels.min(), 4095 * pixels.max()))
    assert (found.images, found.depth, found.channels) == (16, "uint16", 1)
    found.write(tmp_path / "stats.json")
    assert normalization_of(str(tmp_path / "stats.json"), 1) == (found.mean, found.std)
    with pytest.raises(ValueError, match="1 means, 1 deviations, not 3 each"):
        normalization_of(str(tmp_path / "stats.json"))
    with pytest.raises(ValueError, match=r"--data\.normalization halve: no file of `beit-fast stats`"):
        normalization_of("halve")
    for number, text in enumerate(("[" * 100_000, f'{{"mean": [{10**400}], "std": [1]}}', '{"mean": 3, "std": [1]}')):
        (tmp_path / f"{number}.json").write_text(text)
        with pytest.raises(ValueError, match=r"no file of `beit-fast stats`"):
            normalization_of(str(tmp_path / f"{number}.json"), 1)
    floats = ArraySource([np.random.default_rng(i).normal(5, 2, (9, 7, 2)).astype(np.float32) for i in range(3)])
    raw = measure(floats, "floats", 2)
    assert raw.depth == "float32"
    assert raw.mean[0] == pytest.approx(np.mean([floats._images[i][..., 0] for i in range(3)]), rel=1e-5)
    mixed = ArraySource([np.zeros((4, 4, 1), np.uint16), np.zeros((4, 4, 2), np.uint16)])
    with pytest.raises(ValueError, match=r"array:1 has 2 x uint16, array:0 has 1 x uint16"):
        measure(mixed, "mixed", 1)


def test_names_of_normalisations_follow_the_channels():
    assert normalization_of("half", 4) == ((0.5,) * 4, (0.5,) * 4)
    assert normalization_of("imagenet", 1)[0] == (pytest.approx((0.485 + 0.456 + 0.406) / 3),)
    assert normalization_of("imagenet", 5)[0] == (0.485, 0.456, 0.406, 0.485, 0.456)


def test_a_changed_file_of_statistics_is_another_run(place, tmp_path):
    stats = tmp_path / "stats.json"
    stats.write_text(json.dumps({"mean": [0.4], "std": [0.2]}))
    evaluation = pretrain.EvaluationConfig()
    data = dataclasses.replace(config(place, tmp_path).data, normalization=str(stats))
    run = config(place, tmp_path / "run", data=data, evaluation=evaluation, max_steps=2)
    engine.run(pretrain.MaskedImageModeling(run))
    stats.write_text(json.dumps({"mean": [0.5], "std": [0.2]}))
    with pytest.raises(ValueError, match=r"began with normalization .*0\.4.*now .*0\.5"):
        engine.run(pretrain.MaskedImageModeling(dataclasses.replace(run, max_steps=4)))


def test_a_tokenizer_of_the_same_channels(place, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "two").mkdir()
    for number in range(8):
        np.save(tmp_path / f"two/{number}.npy", np.stack([scan(number % 2, rng), scan(0, rng)], 2))
    quantizer = tokenizer.QuantizerConfig(live_codes=8, init_latents=64, kmeans_rounds=1, autoencoder_steps=2)
    data = tokenizer.TokenizerDataConfig(path=tmp_path / "two", channels=2, view_sizes=(16, 24))
    training = tokenizer.TrainTokenizerConfig(
        output_dir=tmp_path / "tokenizer", steps=4, batch_size=4, batch_per_device=4, vocab_size=16, hidden_dim=8,
        codebook_dim=4, data=data, quantizer=quantizer, log=LogConfig(every_steps=4, progress="none"),
    )  # fmt: skip
    assert engine.run(tokenizer.TrainTokenizer(training)).exit_code == 0
    assert (tmp_path / "tokenizer/reconstructions_16px.png").is_file()
    own = load_tokenizer(tmp_path / "tokenizer/tokenizer.safetensors")
    assert (own.channels, own.vocab_size) == (2, 16)
    data = pretrain.DataConfig(path=str(tmp_path / "two"), channels=2, normalization="half", threads=1)
    evaluation = pretrain.EvaluationConfig(path=str(tmp_path / "two"), images=4, pictures=2)
    name = str(tmp_path / "tokenizer/tokenizer.safetensors")
    run = config(
        place, tmp_path / "run", data=data, evaluation=evaluation, tokenizer=pretrain.TokenizerConfig(name=name)
    )
    assert engine.run(pretrain.MaskedImageModeling(run)).exit_code == 0
    assert list((tmp_path / "run/pictures").glob("reconstructions_*.png"))
    with pytest.raises(ValueError, match=r"sees 3 channels, the images have 2; train one .*--data\.channels 2"):
        built(dataclasses.replace(run, output_dir=tmp_path / "x", tokenizer=pretrain.TokenizerConfig(name="demo")))
    scans = config(place, tmp_path / "y", tokenizer=pretrain.TokenizerConfig(name=name))
    with pytest.raises(ValueError, match=r"sees 2 channels, the images have 1; take the --data\.channels"):
        built(scans)


def test_fine_tuning_on_channels_of_their_own(place, tmp_path):
    data = finetune.LabelledDataConfig(
        path=str(place / "labelled"), channels=1, value_range=(0.0, 4095.0), normalization="half", threads=1
    )
    tuned = finetune.FinetuneConfig(
        output_dir=tmp_path / "run", steps=2, batch_size=4, batch_per_device=4, weights=str(place / "pt22k.pth"),
        data=data, augment=finetune.AugmentConfig(rand_augment=0), optim=OptimConfig(warmup_steps=1, clip_grad=None),
        model=finetune.ClassifierModelConfig(image_size=(32, 40), patch_size=8, width=32, depth=2, num_heads=2),
        log=LogConfig(every_steps=1, progress="none"),
    )  # fmt: skip
    assert engine.run(finetune.Finetune(tuned)).exit_code == 0
    assert Beit.from_pretrained(tmp_path / "run/model").config.in_chans == 1
    lora = dataclasses.replace(tuned, output_dir=tmp_path / "lora", lora=LoraConfig(rank=2), frozen_blocks=0)
    pytest.importorskip("peft")
    assert engine.run(finetune.Finetune(lora)).exit_code == 0
    merged_state = Beit.from_pretrained(tmp_path / "lora/model").state_dict()
    assert set(merged_state) == set(Beit.from_pretrained(tmp_path / "run/model").state_dict())
    start = torch.load(place / "pt22k.pth")["model"]
    assert not torch.equal(merged_state["blocks.0.mlp.fc1.weight"], start["blocks.0.mlp.fc1.weight"])
    assert torch.equal(merged_state["blocks.0.mlp.fc1.bias"], start["blocks.0.mlp.fc1.bias"])
    refused = dataclasses.replace(tuned, output_dir=tmp_path / "x", augment=finetune.AugmentConfig())
    with pytest.raises(ValueError, match=r"RandAugment is made for RGB of 8 bits; .*--augment\.rand-augment 0"):
        finetune.Finetune(refused).build(CPU)


def test_defaults_follow_the_images_seen_and_give_way(place, tmp_path):
    asked = config(place, tmp_path, defaults_by_images_seen=True, steps=100, batch_size=64)
    row = defaults_for(6400)
    found = with_images_seen(asked, set())
    assert found.optim.lr == pytest.approx(row.lr * 1.5e-3 * (64 / 2048) ** 0.5)
    assert (found.optim.warmup_steps, found.layer_decay) == (round(row.warmup * 100), row.layer_decay)
    typed = {"optim.lr", "layer_decay", "optim.warmup_epochs"}
    kept = with_images_seen(asked, typed)
    assert (kept.optim.lr, kept.layer_decay, kept.optim.warmup_steps) == (1e-3, None, 1)
    assert with_images_seen(dataclasses.replace(asked, steps=None), set()).optim == asked.optim
    lines = dict(pretrain.budget_lines(found, 200))
    assert lines["budget"] == "6,400 images seen: 32.0 times each of 200"
    assert "tried on built-in images" in lines["  for so many"]
    long = dict(pretrain.budget_lines(dataclasses.replace(found, steps=10**6), 200))
    assert "an estimate" in long["  for so many"]
