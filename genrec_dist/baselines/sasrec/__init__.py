"""SASRec, its training, its run directory, and its mixture with kNN."""
