"""Images for training, evaluation and calibration: loaders from a folder, a parquet file or a data set's name."""

from daqconvert.data.classes import Classes, published_classes, read_classes, renumbered
from daqconvert.data.decoding import check_images
from daqconvert.data.images import Loaders, answered_by, create_loaders
from daqconvert.data.input_config import InputConfig, input_config
from daqconvert.data.parquet import ParquetImages
from daqconvert.data.splits import Splits, open_splits
from daqconvert.data.transforms import Augmentation

__all__ = [
    "Augmentation", "Classes", "InputConfig", "Loaders", "ParquetImages", "Splits", "answered_by", "check_images",
    "create_loaders", "input_config", "open_splits", "published_classes", "read_classes", "renumbered",
]  # fmt: skip
