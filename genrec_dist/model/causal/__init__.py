"""Causal language models that read titles and write the next one."""
