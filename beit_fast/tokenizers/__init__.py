"""Image tokenizers: images to visual tokens and back. `load_tokenizer` is the way in."""

from beit_fast.tokenizers.base import Tokenizer, TokenizerError
from beit_fast.tokenizers.dalle import DalleTokenizer
from beit_fast.tokenizers.discrete_vae import DiscreteVAE
from beit_fast.tokenizers.load import load_tokenizer

__all__ = ["DalleTokenizer", "DiscreteVAE", "Tokenizer", "TokenizerError", "load_tokenizer"]
