"""Hyper-parameter sweeps over GenRec recipes."""
