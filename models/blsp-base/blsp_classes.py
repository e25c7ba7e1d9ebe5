"""The processor of this folder is in the package blsp: pip install blsp."""
