import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.tokenizers import DalleTokenizer, TokenizerError
from beit_fast.tokenizers.dalle import DalleDecoder, DalleEncoder, map_pixels, unmap_pixels

GAIN = 1 / 64  # 4 groups of 2 blocks, squared


def plain_conv(x: Tensor, state: dict[str, Tensor], name: str, kernel: int) -> Tensor:
    assert state[f"{name}.w"].shape[-1] == kernel
    return F.conv2d(x, state[f"{name}.w"], state[f"{name}.b"], padding=(kernel - 1) // 2)


def plain_block(x: Tensor, state: dict[str, Tensor], name: str, kernels: tuple[int, ...]) -> Tensor:
    residual = x
    for i, kernel in enumerate(kernels, 1):
        residual = plain_conv(residual.clamp(min=0), state, f"{name}.res_path.conv_{i}", kernel)
    identity = plain_conv(x, state, f"{name}.id_path", 1) if f"{name}.id_path.w" in state else x
    return identity + GAIN * residual


def plain_encoder(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    x = plain_conv(x, state, "blocks.input", 7)
    for group in (1, 2, 3, 4):
        for block in (1, 2):
            x = plain_block(x, state, f"blocks.group_{group}.block_{block}", (3, 3, 3, 1))
        if group < 4:
            x = F.max_pool2d(x, 2)
    return plain_conv(x.clamp(min=0), state, "blocks.output.conv", 1)


def plain_decoder(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    x = plain_conv(x, state, "blocks.input", 1)
    for group in (1, 2, 3, 4):
        for block in (1, 2):
            x = plain_block(x, state, f"blocks.group_{group}.block_{block}", (1, 3, 3, 3))
        if group < 4:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return plain_conv(x.clamp(min=0), state, "blocks.output.conv", 1)


@pytest.fixture
def small() -> tuple[DalleEncoder, DalleDecoder]:
    torch.manual_seed(0)
    encoder, decoder = DalleEncoder(8, 50), DalleDecoder(12, 8, 50)
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            parameter.data.mul_(3)  # so that the residual branches count
    return encoder, decoder


def test_released_size() -> None:
    with torch.device("meta"):
        encoder, decoder = DalleEncoder(), DalleDecoder()
    assert sum(p.numel() for p in encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in decoder.parameters()) == 43_829_766
    names = {n: tuple(p.shape) for n, p in encoder.named_parameters()}
    assert names["blocks.input.w"] == (256, 3, 7, 7)
    assert names["blocks.group_2.block_1.id_path.w"] == (512, 256, 1, 1)
    assert names["blocks.group_4.block_2.res_path.conv_4.b"] == (2048,)
    assert names["blocks.output.conv.w"] == (8192, 2048, 1, 1)
    assert "blocks.group_1.block_1.id_path.w" not in names
    names = {n: tuple(p.shape) for n, p in decoder.named_parameters()}
    assert names["blocks.input.w"] == (128, 8192, 1, 1)
    assert names["blocks.group_1.block_1.res_path.conv_1.w"] == (512, 128, 1, 1)
    assert names["blocks.group_3.block_1.res_path.conv_4.w"] == (512, 128, 3, 3)
    assert names["blocks.output.conv.w"] == (6, 256, 1, 1)
    tokenizer = DalleTokenizer(encoder)
    assert tokenizer.multiply_adds(112, 112) / 1e9 == pytest.approx(26.06, abs=0.005)
    assert tokenizer.multiply_adds(224, 224) / 1e9 == pytest.approx(104.24, abs=0.005)
    assert tokenizer.multiply_adds(112, 112) - tokenizer.multiply_adds(112, 112, 75) == 121 * 2048 * 8192
    assert encoder(torch.empty(2, 3, 112, 112, device="meta")).shape == (2, 8192, 14, 14)
    assert decoder(torch.empty(2, 8192, 14, 14, device="meta")).shape == (2, 6, 112, 112)


def test_encoder_and_decoder_are_the_formulas(small: tuple[DalleEncoder, DalleDecoder]) -> None:
    encoder, decoder = (module.double() for module in small)
    x = torch.rand(2, 3, 32, 24, dtype=torch.float64)
    torch.testing.assert_close(encoder(x), plain_encoder(x, encoder.state_dict()), rtol=1e-12, atol=1e-12)
    soft = torch.rand(2, 50, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(decoder(soft), plain_decoder(soft, decoder.state_dict()), rtol=1e-12, atol=1e-12)


def test_encode_and_decode(small: tuple[DalleEncoder, DalleDecoder]) -> None:
    encoder, decoder = small
    tokenizer = DalleTokenizer(encoder, decoder)
    assert (tokenizer.vocab_size, tokenizer.stride) == (50, 8)
    images = torch.rand(3, 3, 32, 48)
    expected = plain_encoder(0.8 * images + 0.1, encoder.state_dict()).argmax(1)
    ids = tokenizer.encode(images)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected)
    one_hot = F.one_hot(ids, 50).permute(0, 3, 1, 2).float()
    mean = plain_decoder(one_hot, decoder.state_dict())[:, :3]
    decoded = tokenizer.decode(ids)
    torch.testing.assert_close(decoded, ((mean.sigmoid() - 0.1) / 0.8).clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert 0 <= decoded.min() < decoded.max() <= 1


def test_half_precision_keeps_the_output_convolution_in_fp32(small: tuple[DalleEncoder, DalleDecoder]) -> None:
    images = torch.rand(4, 3, 64, 64)
    full = DalleTokenizer(*small).encode(images)
    tokenizer = DalleTokenizer(*small).to_precision(torch.bfloat16)
    dtypes = {name: p.dtype for name, p in tokenizer.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        "encoder.blocks.output.conv.w",
        "encoder.blocks.output.conv.b",
        "decoder.blocks.input.w",
        "decoder.blocks.input.b",
    }
    ids = tokenizer.encode(images)
    assert (ids == full).float().mean() > 0.8  # bf16 of a random net; chance is 2 %
    assert tokenizer.decode(ids).dtype == torch.float32


def test_pixel_map() -> None:
    x = torch.linspace(0, 1, 11, dtype=torch.float64)
    mapped = map_pixels(x)
    torch.testing.assert_close(mapped * 255, (x * 255 + 31.875) / 318.75 * 255)  # mmpretrain's mean and std
    torch.testing.assert_close(unmap_pixels(mapped), x)
    assert unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]


def test_a_missing_part_is_named(small: tuple[DalleEncoder, DalleDecoder]) -> None:
    with pytest.raises(TokenizerError, match=r"decoder\.pkl"):
        DalleTokenizer(small[0]).decode(torch.zeros(1, 2, 2, dtype=torch.int64))
    with pytest.raises(TokenizerError, match=r"encoder\.pkl"):
        DalleTokenizer(None, small[1]).encode(torch.rand(1, 3, 16, 16))
