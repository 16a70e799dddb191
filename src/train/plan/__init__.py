"""`plan=true`: estimates of the memory, time and disk space that the training stages need."""
