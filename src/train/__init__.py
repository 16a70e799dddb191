"""The pipeline: configuration, Lightning modules, stages. Puts `data` and `models` together."""
