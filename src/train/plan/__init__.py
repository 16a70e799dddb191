"""`plan=true`: estimated memory, time and disk of the training stages."""
