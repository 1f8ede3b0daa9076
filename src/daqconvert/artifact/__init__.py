"""The artifact: a directory of packed safetensors and JSON; written whole, read strictly, without pickle."""

from daqconvert.artifact.manifest import Manifest, read_manifest
from daqconvert.artifact.reading import load
from daqconvert.artifact.writing import save

__all__ = ["Manifest", "load", "read_manifest", "save"]
