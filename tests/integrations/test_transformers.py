"""accelerate, restore and attn_implementation="beit_fast" on transformers' BEiTs: same numbers, names and objects."""

import copy
import inspect
import io
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import beit_fast
from beit_fast import BeitConfig
from benchmarks.baselines.libraries import transformers_beit
from benchmarks.baselines.torchvision_stubs import make_torchvision_importable

make_torchvision_importable()
find_labels = pytest.importorskip("transformers.utils.generic").find_labels

SMALL = BeitConfig(width=48, depth=4, num_heads=3, patch_size=8, image_size=32, vocab_size=60, num_classes=7)
ARCHITECTURES = {
    "plus": {"relative_position_bias": "per_block"},
    "shared": {"relative_position_bias": "shared"},
    "plain": {"relative_position_bias": "none", "use_abs_pos_emb": True, "layer_scale_init": None},
}
KINDS = {
    "BeitModel": {},
    "BeitForImageClassification": {},
    "BeitForMaskedImageModeling": {},
    "BeitForSemanticSegmentation": {"out_indices": [1, 2, 3, 4], "auxiliary_channels": 16},
    "BeitBackbone": {"out_indices": [1, 2, 3, 4], "add_fpn": True},
}
X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
MASK = torch.rand(4, 16, generator=torch.Generator().manual_seed(2)) < 0.4
TOKENS = torch.randint(0, 60, (int(MASK.sum()),), generator=torch.Generator().manual_seed(3))


def make(kind, architecture="plus", attention="sdpa", **overrides):
    torch.manual_seed(0)
    options = {"attn_implementation": attention, "drop_path_rate": 0.0, **KINDS[kind], **overrides}
    model = transformers_beit(replace(SMALL, **ARCHITECTURES[architecture]), kind, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.train()


def inputs(kind):
    if kind == "BeitForMaskedImageModeling":
        return {"pixel_values": X, "bool_masked_pos": MASK, "labels": TOKENS}
    if kind == "BeitForSemanticSegmentation":
        return {
            "pixel_values": X,
            "labels": torch.randint(0, 7, (4, 32, 32), generator=torch.Generator().manual_seed(4)),
        }
    return (
        {"pixel_values": X, "labels": torch.arange(4)} if kind == "BeitForImageClassification" else {"pixel_values": X}
    )


def tensors_of(output):
    """Every tensor of an output by its place."""
    found = {}
    for key, value in output.items():
        for index, tensor in enumerate(value if isinstance(value, tuple) else (value,)):
            found[f"{key}[{index}]"] = tensor
    return found


def step(model, kind, **options):
    """All outputs, and every gradient by name, of one step with its own random numbers."""
    torch.manual_seed(5)
    model.zero_grad(set_to_none=True)
    output = model(**inputs(kind), **options)
    loss = output.get("loss")
    if loss is None:
        loss = sum(t.float().square().mean() for t in tensors_of(output).values())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach() for name, tensor in tensors_of(output).items()}, gradients


def assert_same(found, expected, tolerance=1e-5):
    assert found[0].keys() == expected[0].keys()
    for name, tensor in expected[0].items():
        assert (found[0][name] - tensor).abs().max() < tolerance * max(1, tensor.abs().max()), name
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-8, name


def is_faster(model):
    return any(type(module).__module__.startswith("beit_fast") for module in model.modules())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_outputs_and_gradients(kind, architecture, attention):
    model = make(kind, architecture, attention)
    expected = step(model, kind)
    identities = {name: id(p) for name, p in model.named_parameters()}
    keys, text = list(model.state_dict()), repr(model)
    assert beit_fast.accelerate(beit_fast.accelerate(model)) is model
    assert is_faster(model)
    assert_same(step(model, kind), expected)
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert list(model.state_dict()) == keys
    assert repr(model) == text
    assert beit_fast.restore(model) is model
    assert not is_faster(model)
    again = step(model, kind)
    assert all(torch.equal(again[0][name], tensor) for name, tensor in expected[0].items())


@pytest.mark.parametrize("kind", KINDS)
def test_in_evaluation(kind):
    model = make(kind).eval()
    with torch.no_grad():
        expected = tensors_of(model(**inputs(kind)))
        found = tensors_of(beit_fast.accelerate(model)(**inputs(kind)))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_is_watched_as_before(kind):
    model = make(kind, "shared", "eager").eval()
    for options in ({"output_hidden_states": True}, {"output_attentions": True, "output_hidden_states": True}, {}):
        expected = step(model, kind, **options)
        assert_same(step(beit_fast.accelerate(model), kind, **options), expected)
        beit_fast.restore(model)
    beit_fast.accelerate(model)
    step(model, kind, output_attentions=True)
    assert all(layer._is_as_made({}) for layer in model.modules() if type(layer).__name__ == "BeitLayer")


@pytest.mark.parametrize("architecture", ["plus", "shared"])
@pytest.mark.parametrize("side", [48, (24, 40)])
def test_another_input_size(architecture, side):
    model = make("BeitModel", architecture)
    height, width = side if isinstance(side, tuple) else (side, side)
    x = torch.randn(2, 3, height, width)
    outputs, gradients = [], []
    for _ in range(2):
        model.zero_grad()
        out = model(x, interpolate_pos_encoding=bool(outputs)).last_hidden_state
        out.square().mean().backward()
        outputs.append(out.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        beit_fast.accelerate(model)
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=0)
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-8, name


def test_tables_that_are_not_square():
    """transformers reads such a table with its sides exchanged; so does the faster one."""
    model = make("BeitModel", image_size=(24, 40))
    x = torch.randn(2, 3, 24, 40)
    expected = model(x).last_hidden_state
    torch.testing.assert_close(beit_fast.accelerate(model)(x).last_hidden_state, expected, atol=1e-5, rtol=0)


def test_masks_of_patches_go_to_the_own_forward():
    model = make("BeitModel", "plain").eval()
    mask = torch.ones(4, 17, dtype=torch.int64)
    mask[0, 9:] = 0
    expected = model(X, attention_mask=mask).last_hidden_state
    assert not torch.allclose(expected, model(X).last_hidden_state)
    torch.testing.assert_close(beit_fast.accelerate(model)(X, attention_mask=mask).last_hidden_state, expected)


def test_drop_path_draws_the_same_random_numbers():
    kind = "BeitForImageClassification"
    model = make(kind, drop_path_rate=0.6)
    expected = step(model, kind)
    assert_same(step(beit_fast.accelerate(model), kind), expected)


def test_active_dropout_hooks_and_replaced_layers():
    kind = "BeitForImageClassification"
    model = make(kind, hidden_dropout_prob=0.3)
    expected = step(model, kind)
    assert_same(step(beit_fast.accelerate(model), kind), expected)
    seen = []
    model = make(kind)
    model.beit.layers[0].attention.register_forward_hook(lambda module, args, out: seen.append(out[0].shape))

    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x

    for layer in model.beit.layers:
        layer.attention.q_proj.__class__ = layer.attention.o_proj.__class__ = Adapted
    expected = step(model, kind)
    assert_same(step(beit_fast.accelerate(model), kind), expected)
    assert seen == [(4, 17, 48)] * 2


def test_copies_pickles_and_saved_folders(tmp_path):
    from transformers import BeitForMaskedImageModeling

    kind = "BeitForMaskedImageModeling"
    model = beit_fast.accelerate(make(kind, "shared"))
    expected = step(model, kind)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert is_faster(twin)
        assert_same(step(twin, kind), expected)
    model.save_pretrained(tmp_path)
    loaded = BeitForMaskedImageModeling.from_pretrained(tmp_path)
    assert loaded.config.architectures == [kind]
    assert_same(step(loaded.train(), kind), expected)


@pytest.mark.parametrize("architecture", ["plus", "shared"])
def test_compiled_without_graph_breaks(architecture):
    kind = "BeitForImageClassification"
    model = make(kind, architecture, num_hidden_layers=2)
    expected = model(X).logits
    compiled = torch.compile(beit_fast.accelerate(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["BeitModel", "BeitBackbone", "BeitForSemanticSegmentation"])
def test_models_that_collect_hidden_states_compile_too(kind):
    model = make(kind).eval()
    with torch.no_grad():
        expected = tensors_of(model(X))
        found = tensors_of(torch.compile(beit_fast.accelerate(model), backend="eager", fullgraph=True)(X))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiled_before_and_restored_after():
    kind = "BeitForMaskedImageModeling"
    model = make(kind, "shared", num_hidden_layers=2)
    compiled = torch.compile(model, backend="aot_eager")
    expected = compiled(**inputs(kind))
    for change in (beit_fast.accelerate, beit_fast.restore):
        change(model)
        found = compiled(**inputs(kind))
        torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)


def test_gradient_checkpointing():
    kind = "BeitForImageClassification"
    model = make(kind, "shared", drop_path_rate=0.3)
    expected = step(model, kind)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(step(beit_fast.accelerate(model), kind), expected)


def test_under_autocast():
    kind = "BeitForMaskedImageModeling"
    model = make(kind, "shared")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = step(model, kind)
        found = step(beit_fast.accelerate(model), kind)
    exact = step(beit_fast.restore(model), kind)
    for name, tensor in exact[0].items():
        assert found[0][name].dtype == expected[0][name].dtype or name == "loss[0]"
        limit = 1.2 * (expected[0][name] - tensor).norm() + 2e-3 * tensor.norm()
        assert (found[0][name] - tensor).norm() <= limit, name
    for name, gradient in exact[1].items():
        limit = 1.2 * (expected[1][name] - gradient).norm() + 2e-3 * gradient.norm()
        assert (found[1][name] - gradient).norm() <= limit, name


# The head of masked image modelling


def masked_model():
    return beit_fast.accelerate(make("BeitForMaskedImageModeling", "shared"))


def count_head_rows(model):
    rows = []
    model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.shape[:-1].numel()))
    return rows


def test_only_masked_rows_go_through_the_head(monkeypatch):
    model, rows = masked_model(), []
    from beit_fast.integrations import transformers_beit

    op = transformers_beit.masked_cross_entropy
    counted = lambda h, r, *rest: rows.append(len(r)) or op(h, r, *rest)  # noqa: E731
    monkeypatch.setattr(transformers_beit, "masked_cross_entropy", counted)
    model(**inputs("BeitForMaskedImageModeling")).loss.backward()
    assert rows == [len(TOKENS)]


@pytest.mark.parametrize("pooling", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_block_works_at_masked_rows_only(architecture, pooling, monkeypatch):
    """Loss, gradients and the logits that are asked for later are those of the whole block, drop path included."""
    from beit_fast.integrations import blocks

    kind = "BeitForMaskedImageModeling"
    model = make(kind, architecture, drop_path_rate=0.7, use_mean_pooling=pooling)
    expected = step(model, kind)
    rows, gelu = [], blocks.bias_gelu
    monkeypatch.setattr(
        blocks, "bias_gelu", lambda x, *rest, **options: rows.append(x.shape[:2].numel()) or gelu(x, *rest, **options)
    )
    assert_same(step(beit_fast.accelerate(model), kind), expected)
    assert rows == [4 * 17] * 3 + [len(TOKENS)] + [4 * 17]  # the last one for the logits, which `step` reads
    for options in ({"output_hidden_states": True}, {"output_attentions": True}):
        rows.clear()
        found = step(model, kind, **options)
        assert set(rows) <= {4 * 17}
        assert_same(found, step(beit_fast.restore(model), kind, **options))
        beit_fast.accelerate(model)


@pytest.mark.parametrize(
    "place", ["beit", "beit.layers.3", "beit.layernorm", "beit.layers.3.mlp", "beit.layers.3.mlp.fc2"]
)
def test_who_watches_the_last_block_sees_all_of_it(place):
    kind = "BeitForMaskedImageModeling"
    model = make(kind, "shared", use_mean_pooling=False)
    seen = []
    model.get_submodule(place).register_forward_hook(lambda module, inputs, output: seen.append(output))
    expected = step(model, kind)
    assert_same(step(beit_fast.accelerate(model), kind), expected)
    one, other = (output if isinstance(output, torch.Tensor) else output.last_hidden_state for output in seen)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_of_masked_image_modelling():
    kind = "BeitForMaskedImageModeling"
    model = make(kind, "shared", drop_path_rate=0.3)
    expected = step(model, kind)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(step(beit_fast.accelerate(model), kind), expected)


def test_logits_are_there_for_whoever_asks():
    model = masked_model()
    expected = beit_fast.restore(copy.deepcopy(model))(**inputs("BeitForMaskedImageModeling"))
    names = ["loss", "logits"]

    def output():
        return model(**inputs("BeitForMaskedImageModeling"))

    asked = [
        output().logits, output()["logits"], output()[1], output().to_tuple()[1], dict(output())["logits"],
        output().get("logits"), dict(**output())["logits"], list(output().values())[1], output()[:2][1],
        model(**inputs("BeitForMaskedImageModeling"), return_dict=False)[1],
        torch.utils._pytree.tree_leaves(output())[1],
        pickle.loads(pickle.dumps(output())).logits,
    ]  # fmt: skip
    for logits in asked:
        torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=0)
    assert list(output()) == list(output().keys()) == [key for key, _ in output().items()] == names
    assert output().get("attentions", 3) == 3
    assert isinstance(output(), type(expected))
    with pytest.raises(KeyError):
        output()["attentions"]


def test_logits_carry_gradients_and_the_grad_mode_of_the_step():
    model = masked_model()
    peer = beit_fast.restore(copy.deepcopy(model))
    for m in (model, peer):
        output = m(**inputs("BeitForMaskedImageModeling"))
        (output.loss + output.logits.square().mean()).backward()
    for (name, p), q in zip(model.named_parameters(), peer.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm() + 1e-8, name
    with torch.no_grad():
        output = model(**inputs("BeitForMaskedImageModeling"))
    assert not output.logits.requires_grad
    with torch.inference_mode():
        output = model(**inputs("BeitForMaskedImageModeling"))
    torch.testing.assert_close(output.logits.clone(), model(X, MASK).logits.detach(), atol=1e-5, rtol=0)


def test_logits_after_the_weights_changed_are_refused():
    model = masked_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept, late = (model(**inputs("BeitForMaskedImageModeling")) for _ in range(2))
    before = kept.logits
    late.loss.backward()
    optimizer.step()
    assert kept.logits is before
    with pytest.raises(RuntimeError, match="read them before the optimizer's step"):
        late.logits  # noqa: B018


# attn_implementation


@pytest.mark.parametrize("kind", KINDS)
def test_signatures_stay_what_transformers_reads(kind):
    """`Trainer` drops the columns that `forward` does not name, and takes labels from it; others read it, too."""
    model = make(kind)
    before = {name: inspect.signature(module.forward) for name, module in model.named_modules()}
    labels = find_labels(type(model))
    after = {name: inspect.signature(module.forward) for name, module in beit_fast.accelerate(model).named_modules()}
    assert after[""] == before[""]
    assert {name: list(s.parameters) for name, s in after.items()} == {
        name: list(s.parameters) for name, s in before.items()
    }
    assert find_labels(type(model)) == labels == (["labels"] if "labels" in inputs(kind) else [])
    if kind == "BeitForMaskedImageModeling":
        assert list(before[""].parameters)[:3] == ["pixel_values", "bool_masked_pos", "labels"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["BeitForImageClassification", "BeitForMaskedImageModeling"])
def test_transformers_trainer_trains_an_accelerated_model_as_its_own(kind, tmp_path):
    """With a column that no model knows: the default `remove_unused_columns` has to find out by the signature."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    examples = [{**{name: value[row] for name, value in inputs("BeitForImageClassification").items()}, "path": str(row)}
                for row in range(4)]  # fmt: skip
    losses = []
    for model in (make(kind), beit_fast.accelerate(make(kind))):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to="none", use_cpu=True, logging_steps=1
        )
        trainer = Trainer(model, arguments, train_dataset=examples)
        if kind == "BeitForMaskedImageModeling":
            trainer.data_collator = Masked(trainer.data_collator)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


class Masked:
    """Collates images with the masks and tokens of a pre-training step."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, rows):
        return self.collate([{"pixel_values": row["pixel_values"]} for row in rows]) | {
            "bool_masked_pos": MASK,
            "labels": TOKENS,
        }


@pytest.mark.slow
def test_lora_of_peft_on_an_accelerated_model():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    outputs = []
    for model in (make("BeitForImageClassification"), beit_fast.accelerate(make("BeitForImageClassification"))):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, settings)
        loss = adapted(**inputs("BeitForImageClassification")).loss
        loss.backward()
        outputs.append([loss, *(p.grad for p in adapted.parameters() if p.requires_grad)])
    assert len(outputs[0]) == 1 + 4 * 2 * 2
    for found, expected in zip(outputs[1], outputs[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_as_an_attention_implementation(architecture):
    from beit_fast.integrations import transformers_beit

    transformers_beit.register()
    kind = "BeitForImageClassification"
    expected = step(make(kind, architecture), kind)
    assert_same(step(make(kind, architecture, "beit_fast"), kind), expected)
    model = make(kind, architecture)
    model.set_attn_implementation("beit_fast")
    assert_same(step(model, kind), expected)
    assert_same(step(beit_fast.accelerate(model), kind), expected)


def test_attention_that_is_not_ours_to_do():
    from transformers import ViTConfig, ViTModel

    from beit_fast.integrations import transformers_beit

    transformers_beit.register()
    model = make("BeitModel", "plain").eval()
    mask = torch.ones(4, 17, dtype=torch.int64)
    mask[0, 9:] = 0
    expected = model(X, attention_mask=mask).last_hidden_state
    model.set_attn_implementation("beit_fast")
    torch.testing.assert_close(model(X, attention_mask=mask).last_hidden_state, expected, atol=1e-5, rtol=0)
    vit = ViTModel(
        ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64, image_size=32)
    ).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = vit(x).last_hidden_state
    vit.set_attn_implementation("beit_fast")
    torch.testing.assert_close(vit(x).last_hidden_state, expected, atol=1e-5, rtol=0)


def test_what_is_not_supported_is_named():
    model = make("BeitModel", hidden_act="gelu_new")
    with pytest.raises(ValueError, match=r"block 'layers\.0' is not supported: its activation"):
        beit_fast.accelerate(model)
    assert not is_faster(model)


def test_stages_are_numbered_from_one():
    """BeitBackbone's out_indices count blocks from 1: 1 + the official numbers, which our features take."""
    model = make("BeitBackbone", "plus", add_fpn=False, out_indices=[2, 4])
    ours = beit_fast.Beit(replace(SMALL, relative_position_bias="per_block", num_classes=0))
    from beit_fast.models import convert_state_dict
    from beit_fast.models.checkpoints import load_state_dict

    load_state_dict(ours, convert_state_dict(model.state_dict(), to="official"))
    found = ours.forward_intermediates(X, indices=[1, 3], intermediates_only=True)
    for ours_map, theirs in zip(found, model(X).feature_maps, strict=True):
        torch.testing.assert_close(ours_map, theirs, atol=1e-5, rtol=0)


def test_the_segmentation_model_reads_one_stage_less():
    """As the README says: out_indices [1, 2, 3, 4] are the embedding and the official blocks 0, 1 and 2."""
    model = make("BeitForSemanticSegmentation").eval()
    tokens, read = [], []
    model.beit.embeddings.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    for layer in model.beit.layers:
        layer.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    model.fpn.register_forward_pre_hook(lambda module, inputs: read.extend(inputs[0]))
    beit_fast.accelerate(model)(X)
    assert len(tokens) == 5
    for stage, features in zip(tokens[:4], read, strict=True):
        assert torch.equal(features.flatten(2).transpose(1, 2), stage[:, 1:])
