"""Records in: files, tables, Hub data sets and mixes of them; the schema of a conversation; rejected records."""
