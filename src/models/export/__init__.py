"""Export of the drafter: write, load, check, and download from the Hub."""

from models.export.artifact_io import export_draft, load_draft
from models.export.recommendation import recommended

__all__ = ["export_draft", "load_draft", "recommended"]
