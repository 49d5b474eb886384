"""The secrets service of Kaggle's notebooks on loopback, for a client with KAGGLE_URL_BASE set to its `url`.

Serves a secret by its label to whoever shows the notebook's token; no tokens of Google's services.
"""

from .base import HttpError, LoopbackServer, Reply, Request


class KaggleServer(LoopbackServer):
    """`secrets` maps the labels that are attached to the notebook to their values."""

    def __init__(self, token: str, secrets: dict[str, str] | None = None) -> None:
        super().__init__()
        self.token, self.secrets = token, secrets or {}

    def get_secret(self, request: Request) -> Reply:
        if request.headers.get("X-Kaggle-Authorization") != f"Bearer {self.token}":
            raise HttpError(401, "Unauthenticated")
        label = request.json()["Label"]
        if label not in self.secrets:
            return Reply(
                {"wasSuccessful": False, "errors": [f"No user secrets exist for label {label}"]}
            )
        return Reply({"wasSuccessful": True, "result": {"secret": self.secrets[label]}})

    routes = (("POST", "/requests/GetUserSecretByLabelRequest", get_secret),)
