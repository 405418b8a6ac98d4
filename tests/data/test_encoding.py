import pytest
import torch

from bcoskit.data import decode, encode


def test_channels_come_first_and_complements_after():
    x = torch.tensor([0.0, 0.25, 1.0]).view(3, 1, 1)
    assert encode(x).flatten().tolist() == [0.0, 0.25, 1.0, 1.0, 0.75, 0.0]


@pytest.mark.parametrize("batch", [(), (1,), (3,)])
@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_decode_inverts_encode(batch, channels, dtype):
    x = torch.rand(*batch, channels, 2, 3, dtype=torch.float64).to(dtype)
    encoded = encode(x)
    assert encoded.dtype == dtype
    assert encoded.shape == (*batch, 2 * channels, 2, 3)
    torch.testing.assert_close(decode(encoded), x, rtol=0, atol=0)
    torch.testing.assert_close(encoded.narrow(-3, channels, channels), 1 - x, rtol=0, atol=0)


def test_gradient_is_that_of_both_halves():
    x = torch.rand(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(2, 6, 2, 2, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((encode(x) * weight).sum(), x)
    torch.testing.assert_close(gradient, weight[:, :3] - weight[:, 3:])


def test_roundings_are_tolerated_and_an_empty_batch_is_fine():
    assert encode(torch.full((1, 1, 1), 1 + 5e-7, dtype=torch.float64)).max() == 1 + 5e-7
    assert encode(torch.empty(0, 3, 4, 4)).shape == (0, 6, 4, 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match="divide by 255"):
        encode(torch.zeros(3, 2, 2, dtype=dtype))


@pytest.mark.parametrize("value", [-0.01, 1.01, 255.0, float("nan"), float("inf")])
def test_values_out_of_range_are_refused(value):
    x = torch.full((3, 2, 2), 0.5)
    encode(x)
    x[1, 0, 1] = value
    with pytest.raises(ValueError, match=r"values in \[0, 1\]"):
        encode(x)


@pytest.mark.parametrize("function", [encode, decode])
@pytest.mark.parametrize("shape", [(), (6,), (6, 6), (1, 1, 6, 2, 2)])
def test_other_shapes_are_refused(function, shape):
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        function(torch.zeros(shape))


@pytest.mark.parametrize("channels", [0, 1, 3])
def test_decode_refuses_odd_channels(channels):
    with pytest.raises(ValueError, match="even number of channels"):
        decode(torch.zeros(channels, 2, 2))
