"""What every command does with paths: `~` is expanded, names of outputs are unique."""

import contextlib
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from beit_fast.cli.embed import EmbedOptions
from beit_fast.cli.options import output_names, parse
from beit_fast.cli.predict import PredictOptions
from beit_fast.train.config import expand_home


@dataclass(frozen=True)
class Inner:
    path: str | None = None
    """A path."""


@dataclass(frozen=True)
class Outer:
    output_dir: Path = Path("runs")
    """A folder."""
    images: tuple[Path, ...] = ()
    """Files."""
    number: int = 3
    """A number."""
    data: Inner = field(default_factory=Inner)
    """More."""


def test_home_is_expanded_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    words = ["--output-dir=~/run", "--data.path=~/ds", "--images", "~/a.jpg", "b~.jpg"]
    assert parse(Outer(), words) == Outer(
        Path("/home/somebody/run"), (Path("/home/somebody/a.jpg"), Path("b~.jpg")), 3, Inner("/home/somebody/ds")
    )


def test_home_is_expanded_in_every_recipe(monkeypatch):
    """Every option of every configuration that can hold a path."""
    from beit_fast.train.tasks.finetune import FinetuneConfig
    from beit_fast.train.tasks.pretrain import PretrainConfig
    from beit_fast.train.tasks.segment import SegmentConfig

    def with_each(config, value):
        """Copies of a configuration, each with one option set to a path."""
        for each in dataclasses.fields(config):
            current = getattr(config, each.name)
            if dataclasses.is_dataclass(current):
                choices = list(with_each(current, value))
            elif isinstance(current, Path) or "str | None" in str(each.type):
                choices = [type(current)(value) if isinstance(current, Path) else value]
            else:
                choices = []
            for choice in choices:
                with contextlib.suppress(ValueError):  # an option that needs another one
                    yield dataclasses.replace(config, **{each.name: choice})

    monkeypatch.setenv("HOME", "/home/somebody")
    for kind, least in ((PretrainConfig, 4), (FinetuneConfig, 5), (SegmentConfig, 3)):
        start = kind(scratch=True) if hasattr(kind, "scratch") else kind()
        tilde, expanded = list(with_each(start, "~/x")), list(with_each(start, "/home/somebody/x"))
        assert len(tilde) >= least
        assert [expand_home(config) for config in tilde] == expanded


def test_outputs_get_names_of_their_own():
    paths = [Path("a/0001.jpg"), Path("b/0001.jpg"), Path("a/0001.png"), Path("a/other.jpg")]
    assert output_names(paths) == ["a_0001.jpg", "b_0001.jpg", "a_0001.png", "other"]
    assert output_names([Path("a/1.jpg")]) == ["1"]
    assert output_names([Path("a/1.jpg"), Path("a/1.jpg")]) == ["1", "1"]
    assert output_names([Path("x/1.jpg"), Path("/y/1.jpg")])[1] == "y_1.jpg"
    with pytest.raises(ValueError, match=r"a/b_1\.jpg and a/b/1\.jpg would both be written as b_1\.jpg"):
        output_names([Path("a/b_1.jpg"), Path("a/b_1.png"), Path("a/b/1.jpg"), Path("a/1.jpg")])


@pytest.mark.parametrize(
    "words",
    [
        "RUN a b --top 3 c",
        "--top 3 RUN a b c",
        "RUN --top 3 a b c",
        "RUN a --device cpu b --top 3 c",
        "RUN a b c --top=3",
    ],
)
def test_options_stand_anywhere_among_positionals(words):
    chosen = parse(PredictOptions(), words.split())
    assert (chosen.checkpoint, [str(path) for path in chosen.images], chosen.top) == ("RUN", ["a", "b", "c"], 3)


def test_help_names_what_a_command_takes_after_its_example(capsys):
    with pytest.raises(SystemExit):
        parse(EmbedOptions(), ["--help"], "beit-fast embed")
    out = capsys.readouterr().out
    usage, rest = out.split("\n\n", 1)
    assert usage == "usage: beit-fast embed [-h] [OPTIONS] MODEL IMAGES OUTPUT"
    assert rest.index("beit-fast embed runs/") < rest.index("--device")
