"""The tokens of a batch from a store and a tokenizer that are played here, and what is on its way from a device."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from beit_fast.data.token_store import TokenStore
from beit_fast.train.tasks import token_cache
from beit_fast.train.tasks.token_cache import TokenSource, open_store


class Played:
    """Tokens 100 times the image's number, plus the position; at the masked positions where a mask is given."""

    vocab_size, channels = 1000, 3

    def encode(self, images, mask=None, indices=None):
        tokens = 100 * images[:, 0, 0, 0].long()[:, None, None] + torch.arange(4).view(1, 2, 2)
        assert (mask is None) == (indices is None)
        return tokens if indices is None else tokens.flatten()[indices]


class Written(list):
    """A store's `write`, which fails from the call of number `fails` on."""

    def __init__(self, fails=99):
        super().__init__()
        self.fails, self.calls = fails, 0

    def write(self, epoch, indices, tokens):
        self.calls += 1
        if self.calls >= self.fails:
            raise OSError("no space")
        self.append((epoch, indices.tolist(), tokens.tolist()))


def batch(known=None, unknown=(0, 1, 2), epoch=5):
    """Images number 7, 8 and 9 of four patches, of which the first and the fourth are masked, then the second."""
    mask = torch.tensor([[[1, 0], [0, 1]], [[0, 1], [0, 0]], [[0, 0], [0, 0]]], dtype=torch.bool)
    images = torch.tensor([7.0, 8.0, 9.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    return SimpleNamespace(
        mask=mask, masked_indices=mask.flatten().nonzero()[:, 0], known_tokens=known, epoch=epoch,
        indices=torch.tensor([70, 80, 90]), unknown=torch.tensor(unknown, dtype=torch.long),
        token_images=images if known is None else images[list(unknown)],
    )  # fmt: skip


ALL = [[[100 * n, 100 * n + 1], [100 * n + 2, 100 * n + 3]] for n in (7, 8, 9)]


def test_tokens_without_a_store():
    source = TokenSource(Played(), None)
    assert source.of(batch()).tolist() == [700, 703, 801]
    assert source.of(batch(), predict_all=True).tolist() == ALL


@pytest.mark.parametrize("unknown", [(), (1,), (0, 2), (0, 1, 2)])
def test_tokens_that_are_known_in_part(unknown):
    store = Written()
    source = TokenSource(Played(), store)
    known = torch.tensor(ALL)
    known[list(unknown)] = -1
    before = known.clone()
    assert source.of(batch(known, unknown)).tolist() == [700, 703, 801]
    assert source.of(batch(known, unknown), predict_all=True).tolist() == ALL
    assert torch.equal(known, before)
    row = (5, [(70, 80, 90)[n] for n in unknown], [[number for line in ALL[n] for number in line] for n in unknown])
    assert store == [row] * 2 * bool(unknown)


def test_a_full_store_is_said_once(capsys):
    store = Written(fails=2)
    source = TokenSource(Played(), store)
    for _ in range(4):
        assert source.of(batch(torch.full((3, 2, 2), -1))).tolist() == [700, 703, 801]
    assert (len(store), store.calls) == (1, 2)
    assert capsys.readouterr().err == "warning: no more tokens are kept, training goes on (no space)\n"


def test_copies_from_a_device_are_written_in_order(monkeypatch):
    """Once they have arrived, or where more than eight are on their way; the rest at the end."""
    arrived, waited, store = set(), [], Written()

    class Event:
        count = 0

        def record(self):
            self.number, Event.count = Event.count, Event.count + 1

        def query(self):
            return self.number in arrived

        def synchronize(self):
            waited.append(self.number)

    def pinned(shape, dtype, pin_memory):
        assert pin_memory
        return torch.zeros(shape, dtype=dtype)

    class OnDevice:
        device, shape, dtype = SimpleNamespace(type="cuda"), (3, 2, 2), torch.int64

    monkeypatch.setattr(token_cache.torch.cuda, "Event", Event)
    monkeypatch.setattr(token_cache.torch, "empty", pinned)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda host, new, non_blocking: host.fill_(non_blocking))
    source = TokenSource(Played(), store)
    for epoch in range(8):
        source._keep(batch(epoch=epoch), OnDevice())
    assert waited == []
    source._keep(batch(epoch=8), OnDevice())
    assert waited == [0]
    arrived |= {1, 2, 9}
    source._keep(batch(epoch=9), OnDevice())
    assert waited == [0, 1, 2]
    source.flush()
    assert waited == list(range(10))
    assert store == [(epoch, [70, 80, 90], [[1] * 4] * 3) for epoch in range(10)]
    source.flush()


def test_a_store_is_opened_checked_or_refused(tmp_path, capsys):
    settings = {"seed": 1}

    def tokenizer(size):
        return SimpleNamespace(vocab_size=size)

    with pytest.raises(ValueError, match=r"--data\.view-cycle: 65537 visual tokens do not fit into 16 bits"):
        open_store(tmp_path / "s", tokenizer(65537), 3, 4, 2, settings)
    assert open_store(tmp_path / "s", tokenizer(65536), 3, 4, 2, settings, True) is None
    assert not (tmp_path / "s").exists()
    with open_store(tmp_path / "s", tokenizer(65536), 3, 4, 2, settings) as store:
        store.write(1, np.array([2]), np.array([[1, 2, 3, 65535]]))
        assert isinstance(store, TokenStore)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="was made with seed 1, now 2"):
        open_store(tmp_path / "s", tokenizer(9), 3, 4, 2, {"seed": 2}, True)
    damaged = bytearray((tmp_path / "s").read_bytes())
    damaged[:64] = bytes(64)
    (tmp_path / "s").write_bytes(damaged)
    with open_store(tmp_path / "s", tokenizer(9), 3, 4, 2, settings):
        assert "is damaged: begun anew, the old file is" in capsys.readouterr().out
