"""COLAB_SECRETS, JSON, stands in for the notebook's kernel: a process started by `!python` has none to ask."""

import json
import os

from google.colab import errors


class SecretNotFoundError(errors.Error):
    pass


class NotebookAccessError(Exception):
    pass


def get(key):
    kernel = os.environ.get("COLAB_SECRETS")
    if kernel is None:
        raise AttributeError("'NoneType' object has no attribute 'kernel'")
    secrets = json.loads(kernel)
    if key not in secrets:
        raise SecretNotFoundError(f"Secret {key} does not exist.")
    return secrets[key]
