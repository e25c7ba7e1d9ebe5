"""The processor of this folder is in the package blsp: pip install blsp."""

from blsp.model.processing_blsp import BlspProcessor
