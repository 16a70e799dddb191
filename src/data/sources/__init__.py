"""Data sources: files, tables, Hub data sets and mixtures; the conversation schema; rejected records."""
