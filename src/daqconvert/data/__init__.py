"""Images for training, evaluation and calibration."""

from daqconvert.data.images import Loaders, create_loaders
from daqconvert.data.input_config import InputConfig, input_config
from daqconvert.data.parquet import ParquetImages
from daqconvert.data.splits import Splits, open_splits

__all__ = ["InputConfig", "Loaders", "ParquetImages", "Splits", "create_loaders", "input_config", "open_splits"]
