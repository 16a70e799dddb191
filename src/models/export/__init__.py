"""Writes, loads, checks and downloads exported drafters."""

from models.export.artifact_io import export_draft, load_draft
from models.export.recommendation import recommended

__all__ = ["export_draft", "load_draft", "recommended"]
