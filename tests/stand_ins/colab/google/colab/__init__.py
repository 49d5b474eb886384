"""Stands in for Colab's own package, which is in its notebooks only. `google` stays a namespace, others live in it."""
