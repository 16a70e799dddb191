"""Training pipeline: configuration, Lightning modules and stages. Connects `data` and `models`."""

__version__ = "0.1.0"  # project version; pyproject.toml reads it
