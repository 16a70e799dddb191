"""The exported drafter: writing, reading and checking it, and downloads from the Hub."""

from models.export.artifact_io import export_draft, load_draft, recommended

__all__ = ["export_draft", "load_draft", "recommended"]
