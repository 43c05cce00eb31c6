"""What holds for every model and every size: conversions are inverses, a table at its own size stays (hypothesis)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beit_fast import Beit, BeitConfig, BeitForMaskedImageModeling
from beit_fast.models import convert_state_dict, resize_position_embedding, resize_relative_position_bias_table
from beit_fast.models.key_names import NAMINGS
from beit_fast.models.resize import spline_matrix

WINDOWS = st.tuples(st.integers(1, 9), st.integers(1, 9))


@st.composite
def models(draw):
    """A classifier or a pre-training model of any shape that has names of its own."""
    heads = draw(st.integers(1, 3))
    options = {
        "width": heads * draw(st.sampled_from([2, 4])),
        "num_heads": heads,
        "depth": draw(st.integers(1, 11)),
        "vocab_size": 5,
        "image_size": 32,
        "num_classes": draw(st.sampled_from([0, 3])),
        "use_abs_pos_emb": draw(st.booleans()),
        "layer_scale_init": draw(st.sampled_from([None, 0.1])),
        "use_fc_norm": draw(st.sampled_from([None, True, False])),
    }
    if draw(st.booleans()):
        return Beit(BeitConfig(relative_position_bias=draw(st.sampled_from(["none", "per_block"])), **options))
    bias = draw(st.sampled_from(["none", "shared", "per_block"]))
    return BeitForMaskedImageModeling(BeitConfig(relative_position_bias=bias, **options))


@settings(max_examples=20, deadline=None)
@given(model=models(), chain=st.lists(st.sampled_from(sorted({*NAMINGS} - {"timm"})), min_size=1, max_size=4))
def test_any_chain_of_conversions_comes_back(model, chain):
    """Every tensor, bit by bit; timm's names leave the pre-training's own tensors out, and are tried on classifiers."""
    state = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    if isinstance(model, Beit):
        chain = [*chain, "timm", *chain]
    found = state
    for naming in chain:
        found = convert_state_dict(found, to=naming)
    found = convert_state_dict(found, to="official")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@settings(max_examples=40, deadline=None)
@given(window=WINDOWS, other=WINDOWS, heads=st.integers(1, 3))
def test_resizing_keeps_what_has_no_size(window, other, heads):
    """At its own size everything; at any other the rows of CLS, and what is the same everywhere."""
    rows = (2 * window[0] - 1) * (2 * window[1] - 1) + 3
    table = torch.randn(rows, heads, dtype=torch.float64)
    embedding = torch.randn(1, window[0] * window[1] + 1, 4, dtype=torch.float64)
    assert torch.equal(resize_relative_position_bias_table(table, window, window), table)
    assert torch.equal(resize_position_embedding(embedding, window, window), embedding)
    resized = resize_relative_position_bias_table(table, window, other)
    assert resized.shape == ((2 * other[0] - 1) * (2 * other[1] - 1) + 3, heads)
    assert torch.equal(resized[-3:], table[-3:])
    assert torch.equal(resize_position_embedding(embedding, window, other)[:, 0], embedding[:, 0])
    flat_table, flat = torch.full_like(table, 1.5), torch.full_like(embedding, -0.75)
    found = resize_relative_position_bias_table(flat_table, window, other)
    torch.testing.assert_close(found, torch.full_like(found, 1.5), atol=1e-9, rtol=0)
    found = resize_position_embedding(flat, window, other)  # in fp32
    torch.testing.assert_close(found, torch.full_like(found, -0.75), atol=1e-6, rtol=0)


@settings(max_examples=30, deadline=None)
@given(source=st.integers(1, 24), target=st.integers(1, 24))
def test_spline_matrices_mirror_and_keep_the_middle(source, target):
    """Offsets are signed: the matrix of mirrored offsets is the mirrored matrix; offset 0 stays offset 0."""
    matrix = spline_matrix(source, target)
    assert matrix.shape == (2 * target - 1, 2 * source - 1)
    torch.testing.assert_close(matrix.flip(0, 1), matrix, atol=1e-9, rtol=0)
    middle = torch.zeros(2 * source - 1, dtype=torch.float64)
    middle[source - 1] = 1
    torch.testing.assert_close(matrix[target - 1], middle, atol=1e-9, rtol=0)
    if source == target:
        assert torch.equal(matrix, torch.eye(2 * source - 1, dtype=torch.float64))


def test_every_naming_is_tried():
    assert {"official", "timm", "transformers", "transformers_v4"} == set(NAMINGS)
    with pytest.raises(ValueError, match="choose one of"):
        convert_state_dict({}, to="other")
