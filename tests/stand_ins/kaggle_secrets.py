"""Stands in for Kaggle's own package, which is in its notebooks only: the same protocol, the same errors."""

import json
import os
from urllib.error import URLError
from urllib.request import Request, urlopen


class CredentialError(Exception):
    pass


class BackendError(Exception):
    pass


class UserSecretsClient:
    def __init__(self):
        if not (token := os.environ.get("KAGGLE_USER_SECRETS_TOKEN")):
            raise CredentialError(
                "A JWT Token is required, but there is no KAGGLE_USER_SECRETS_TOKEN"
            )
        self.headers = {
            "Content-Type": "application/json",
            "X-Kaggle-Authorization": f"Bearer {token}",
        }

    def get_secret(self, label: str) -> str:
        url = os.environ["KAGGLE_URL_BASE"] + "/requests/GetUserSecretByLabelRequest"
        request = Request(url, json.dumps({"Label": label}).encode(), self.headers)
        try:
            with urlopen(request, timeout=40) as response:
                answer = json.load(response)
        except URLError as error:  # an HTTP error is one too
            raise ConnectionError("Connection error trying to communicate with service.") from error
        if not answer.get("wasSuccessful") or "secret" not in answer.get("result", {}):
            raise BackendError(f"Unexpected response from the service. Response: {answer}.")
        return answer["result"]["secret"]
