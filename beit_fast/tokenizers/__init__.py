"""Image tokenizers: images to visual tokens and back. `load_tokenizer` is the way in."""

from .base import Tokenizer, TokenizerError
from .dalle import DalleTokenizer
from .discrete_vae import DiscreteVAE
from .load import load_tokenizer

__all__ = ["DalleTokenizer", "DiscreteVAE", "Tokenizer", "TokenizerError", "load_tokenizer"]
