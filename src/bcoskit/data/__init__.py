"""Images from files, folders and parquet shards, as encoded tensors; imports nothing else of bcoskit."""

from bcoskit.data._datasets import cifar10, folder, open_dataset
from bcoskit.data._encoding import decode, encode
from bcoskit.data._files import find_images
from bcoskit.data._images import ImageError, ImageSource, read_image
from bcoskit.data._labelled import ImageDataset
from bcoskit.data._memory import InMemoryImages, in_memory, random_crop_flip
from bcoskit.data._parquet import ParquetImages
from bcoskit.data._streamed import StreamedImages
from bcoskit.data._tar import TarImages
from bcoskit.data._transforms import ImageTransform

__all__ = [
    "ImageDataset",
    "ImageError",
    "ImageSource",
    "ImageTransform",
    "InMemoryImages",
    "ParquetImages",
    "StreamedImages",
    "TarImages",
    "cifar10",
    "decode",
    "encode",
    "find_images",
    "folder",
    "in_memory",
    "open_dataset",
    "random_crop_flip",
    "read_image",
]
