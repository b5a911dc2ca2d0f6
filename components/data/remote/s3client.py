"""The client of S3, and what its errors mean: which may be gone the next time, and what to do about the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.data.remote import insist as limits
from nvila.components.data.remote.insist import said

T = TypeVar("T")
_PASSING_CODES = frozenset(
    {
        "SlowDown",
        "InternalError",
        "ServiceUnavailable",
        "RequestTimeout",
        "RequestTimeoutException",
        "Throttling",
        "ThrottlingException",
        "ThrottledException",
        "TooManyRequests",
        "RequestLimitExceeded",
        "BandwidthLimitExceeded",
        "OperationAborted",
    }
)
_TO_DO = {
    "NoSuchBucket": "Check the bucket's name and AWS_ENDPOINT_URL.",
    "NoSuchKey": "Check the name behind the bucket's.",
    "AccessDenied": "The credentials need s3:ListBucket on the bucket and s3:GetObject on its objects.",
    "403": "The credentials need s3:ListBucket on the bucket and s3:GetObject on its objects.",
    "InvalidAccessKeyId": "Check AWS_ACCESS_KEY_ID, and that it belongs to the store of AWS_ENDPOINT_URL.",
    "SignatureDoesNotMatch": "Check AWS_SECRET_ACCESS_KEY and AWS_REGION.",
    "ExpiredToken": "Renew the credentials; AWS_SESSION_TOKEN has expired.",
    "ExpiredTokenException": "Renew the credentials; AWS_SESSION_TOKEN has expired.",
    "RequestTimeTooSkewed": "Set this machine's clock.",
    "RequestExpired": "Set this machine's clock.",
}
_CREDENTIALS = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give the pod a service account."


def connect() -> Any:
    """A client of the store that the usual AWS variables name. It asks once: `insist` repeats.

    Raises:
        ConfigError: the endpoint, the profile or another variable cannot be used.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        connect_timeout=limits.CONNECT_SECONDS,
        read_timeout=limits.READ_SECONDS,
        retries={"total_max_attempts": 1, "mode": "standard"},
        # What is compared is decided in `checksums`: botocore would check an answer of half an object as a whole.
        response_checksum_validation="when_required",
    )
    try:
        return boto3.client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(
            "no client of S3 can be made", value=said(error), do="Check AWS_ENDPOINT_URL, AWS_REGION and AWS_PROFILE."
        ) from error


def asked(attempt: Callable[[], T], where: str) -> T:
    """What `attempt` returns; an error of the client becomes one of ours.

    Raises:
        DataError: the server refuses, or there are no credentials for it.
    """
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    try:
        return attempt()
    except ClientError as error:
        do = _TO_DO.get(code_of(error))
        raise DataError("cannot be read from S3", where=where, value=said(error), do=do) from error
    except BotoCoreError as error:
        do = _CREDENTIALS if isinstance(error, NoCredentialsError | PartialCredentialsError) else None
        raise DataError("cannot be read from S3", where=where, value=said(error), do=do) from error


def passes(error: Exception) -> bool:
    """Whether the same request may succeed later: the server is overloaded or away, or a connection broke."""
    from http.client import HTTPException

    import urllib3
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    if isinstance(error, exceptions.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return code_of(error) in _PASSING_CODES or status in (408, 425, 429) or (status >= 500 and status != 501)
    if isinstance(error, exceptions.SSLError):
        return False  # a certificate that is not trusted
    return isinstance(
        error,
        exceptions.HTTPClientError
        | exceptions.ConnectionError
        | exceptions.IncompleteReadError
        | exceptions.MetadataRetrievalError
        | ResponseParserError
        | urllib3.exceptions.HTTPError
        | HTTPException
        | ConnectionError
        | TimeoutError,
    )


def code_of(error: Any) -> str:
    """The server's own word for a `ClientError`."""
    return str(error.response.get("Error", {}).get("Code", ""))
