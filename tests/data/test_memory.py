import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_convert

from bcoskit.data import ImageDataset, ImageTransform, InMemoryImages, in_memory, random_crop_flip


def dataset(sizes=((4, 3), (4, 3), (4, 3)), transform=None):
    images = [Image.new("RGB", size, (index, 10, 20)) for index, size in enumerate(sizes)]
    return ImageDataset(images, [index % 2 for index in range(len(sizes))], ["a", "b"], transform)


def test_images_are_decoded_once():
    calls = []
    memory = in_memory(dataset(), lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert memory.images.dtype == torch.uint8
    assert memory.images.shape == (3, 3, 3, 4)
    assert memory.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert memory.images[2, :, 1, 1].tolist() == [2, 10, 20]
    assert memory.labels.tolist() == [0, 1, 0]
    assert memory.classes == ("a", "b")
    assert len(memory) == 3
    image, label = memory[2]
    assert torch.equal(image, memory.images[2])
    assert label == 0


def test_images_of_several_sizes():
    sizes = ((4, 3), (5, 3))
    with pytest.raises(ValueError, match="image 1 of `dataset` has 5x3 pixels, the first one has 4x3"):
        in_memory(dataset(sizes))
    assert in_memory(dataset(sizes, ImageTransform(3).view)).images.shape == (2, 3, 3, 3)


def test_tensors_are_refused():
    with pytest.raises(TypeError, match="must yield images, not Tensor"):
        in_memory(dataset(transform=ImageTransform(3)))


def test_a_loader_takes_whole_batches():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 2, 2)
    memory = InMemoryImages(images, torch.arange(10), [str(label) for label in range(10)])
    asked = []

    class Spy(InMemoryImages):
        def __getitems__(self, indices):
            asked.append(list(indices))
            return super().__getitems__(indices)

    spy = Spy(memory.images, memory.labels, memory.classes)
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(spy, 4, shuffle=True, generator=generator, collate_fn=default_convert)
    batches = list(loader)
    assert [len(indices) for indices in asked] == [4, 4, 2]
    for (batch, labels), indices in zip(batches, asked, strict=True):
        assert torch.equal(batch, images[indices])
        assert labels.tolist() == indices
    assert sorted(index for indices in asked for index in indices) == list(range(10))
    with pytest.raises((RuntimeError, TypeError)):
        next(iter(DataLoader(memory, 4)))


def reference_crop_flip(batch, padding, generator):
    """One image at a time, in float64; the draws are made in the same order."""
    count, _, height, width = batch.shape
    offsets = torch.randint(2 * padding + 1, (2, count), generator=generator).tolist()
    flips = torch.randint(2, (count, 1, 1, 1), generator=generator).flatten().tolist()
    result = torch.zeros(batch.shape, dtype=torch.float64)
    for n in range(count):
        for row in range(height):
            for column in range(width):
                source_row = row + offsets[0][n] - padding
                source_column = (width - 1 - column if flips[n] else column) + offsets[1][n] - padding
                if 0 <= source_row < height and 0 <= source_column < width:
                    result[n, :, row, column] = batch[n, :, source_row, source_column].double()
    return result


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("shape", "padding"), [((9, 3, 5, 4), 2), ((3, 1, 2, 2), 4), ((2, 3, 4, 4), 0)])
def test_crop_and_flip(dtype, shape, padding):
    batch = (torch.rand(shape) * 255).to(dtype)
    before = batch.clone()
    result = random_crop_flip(batch, padding, torch.Generator().manual_seed(1))
    assert result.dtype == dtype
    expected = reference_crop_flip(batch, padding, torch.Generator().manual_seed(1))
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=0)
    assert torch.equal(batch, before)
    other = reference_crop_flip(batch, padding, torch.Generator().manual_seed(2))
    assert not torch.equal(result.double(), other)


def test_every_offset_and_flip_is_equally_likely():
    ids = torch.arange(1, 26).view(1, 1, 5, 5).expand(5000, 1, 5, 5)
    crops = random_crop_flip(ids, 1, torch.Generator().manual_seed(0))
    kinds, counts = crops.flatten(1).unique(dim=0, return_counts=True)
    assert len(kinds) == 3 * 3 * 2
    assert abs(counts / (5000 / 18) - 1).max() < 0.25


def test_the_global_generator_is_the_default():
    batch = torch.rand(6, 3, 8, 8)
    torch.manual_seed(3)
    first = random_crop_flip(batch)
    torch.manual_seed(3)
    assert torch.equal(random_crop_flip(batch), first)
    assert not torch.equal(random_crop_flip(batch), first)
    assert random_crop_flip(batch[:0]).shape == (0, 3, 8, 8)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        random_crop_flip(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match=r"`padding` \(=-1\)"):
        random_crop_flip(torch.zeros(1, 3, 4, 4), -1)
