"""Every public signature, written down: a change of one shows up in a review as a change of public_signatures.txt."""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

SNAPSHOT = Path(__file__).parent / "public_signatures.txt"
MODULES = ("beit_fast.kernels", "beit_fast.models", "beit_fast.tokenizers", "beit_fast.data", "beit_fast")
STABLE = """
beit_fast: create_model list_models accelerate restore use_backend Beit BeitConfig BeitForMaskedImageModeling
beit_fast.kernels: packed_attention biased_attention relative_position_bias residual_layer_norm bias_gelu
beit_fast.kernels: masked_cross_entropy
beit_fast.models: load_checkpoint convert_state_dict resize_relative_position_bias_table
beit_fast.tokenizers: load_tokenizer
beit_fast.data: BlockwiseMasking
"""
"""Names that stay from the first release on."""


def signature(function: object) -> str:
    """The signature with plain annotations, whatever the version of Python calls them."""
    try:
        text = str(inspect.signature(function, eval_str=False))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return "(...)"
    return text.replace("'", "").replace("torch.Tensor", "Tensor").replace("typing.", "").replace("NoneType", "None")


def lines_of(name: str, value: object) -> Iterator[str]:
    """A function's signature; of a class the constructor's, and those of the public methods that beit_fast defines."""
    if not inspect.isclass(value):
        yield f"{name}{signature(value)}" if callable(value) else f"{name}: {type(value).__name__}"
        return
    yield f"class {name}{signature(value)}"
    for method in sorted(dir(value)):
        owner = next((base for base in value.__mro__ if method in vars(base)), object)
        if method.startswith("_") or not owner.__module__.startswith("beit_fast"):
            continue
        member = inspect.getattr_static(value, method)
        if isinstance(member, (staticmethod, classmethod)) or inspect.isfunction(member):
            yield f"    {name}.{method}{signature(getattr(value, method))}"
        elif isinstance(member, property):
            yield f"    {name}.{method}: property"


def public_signatures() -> str:
    lines: list[str] = []
    written: dict[int, str] = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in sorted(module.__all__):
            full, value = f"{module_name}.{name}", getattr(module, name)
            if id(value) in written:  # one object under two names
                lines.append(f"{full} = {written[id(value)]}")
            else:
                lines += lines_of(full, value)
                written[id(value)] = full
    return "\n".join(lines) + "\n"


def test_public_signatures_are_as_written_down():
    """After an intended change: python -m tests.test_public_api."""
    assert public_signatures().splitlines() == SNAPSHOT.read_text().splitlines()


def test_the_stable_names_are_public():
    for line in STABLE.strip().splitlines():
        module, names = line.split(": ")
        assert set(names.split()) <= set(importlib.import_module(module).__all__), module


if __name__ == "__main__":
    SNAPSHOT.write_text(public_signatures())
