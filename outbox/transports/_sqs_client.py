"""The client of one event loop, and what its errors mean."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any, Final

from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from botocore import exceptions

from outbox.errors import ConfigurationError, OutboxError, Refused, Unavailable
from outbox.transports._sqs_settings import Settings

ERRORS: Final = (exceptions.BotoCoreError, exceptions.ClientError, OSError, TimeoutError)
"""What a request may raise."""

MISSING: Final = frozenset({"AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist", "NonExistentQueue"})
_DENIED: Final = frozenset({"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "KmsAccessDenied"})
_WHO: Final = frozenset(
    {
        "InvalidClientTokenId",
        "UnrecognizedClientException",
        "SignatureDoesNotMatch",
        "InvalidSignatureException",
        "IncompleteSignature",
        "MissingAuthenticationToken",
        "MissingAuthenticationTokenException",
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidSecurity",
        "OptInRequired",
    }
)
THROTTLED: Final = frozenset(
    {
        "RequestThrottled",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
        "RequestLimitExceeded",
        "SlowDown",
    }
)
NEVER: Final = frozenset(
    {
        "InvalidMessageContents",
        "InvalidParameterValue",
        "InvalidAttributeValue",
        "MessageTooLong",
        "BatchRequestTooLong",
    }
)
"""What is refused for what is in it, and will be again."""
CONNECT: Final = 5.0


class Client:
    """One client, made when it is first needed. Belongs to one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._exit = AsyncExitStack()
        self._client: Any = None
        self._making = asyncio.Lock()
        self.closed = False

    async def get(self) -> Any:
        """Raises `ConfigurationError`, and `Unavailable` when it is closed."""
        async with self._making:
            if self.closed:
                raise Unavailable("sqs: this transport is closed")
            if self._client is None:
                self._client = await self._made()
            return self._client

    async def _made(self) -> Any:
        settings = self._settings
        config = AioConfig(
            # what is tried again, and for how long, is the relay's and the consumer's to say
            retries={"total_max_attempts": 1, "mode": "standard"},
            connect_timeout=min(CONNECT, settings.delivery_timeout),
            read_timeout=settings.delivery_timeout + settings.wait,
            # twice: for what is read, and for what is published or acknowledged
            max_pool_connections=2 * settings.requests + 4,
            tcp_keepalive=True,
        )
        try:
            session = AioSession(profile=settings.profile)
            return await self._exit.enter_async_context(
                session.create_client(
                    "sqs",
                    region_name=settings.region,
                    endpoint_url=settings.endpoint_url,
                    aws_access_key_id=settings.access_key,
                    aws_secret_access_key=settings.secret_key,
                    config=config,
                )
            )
        except exceptions.NoRegionError as error:
            raise ConfigurationError("sqs: no region: write sqs://eu-central-1, or set AWS_DEFAULT_REGION") from error
        except (exceptions.BotoCoreError, ValueError) as error:
            raise ConfigurationError(f"sqs: {error}") from error

    async def close(self) -> None:
        self.closed = True
        async with self._making:
            self._client = None
            await self._exit.aclose()


def code_of(error: BaseException) -> str:
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, exceptions.ClientError) else ""


def is_missing(error: BaseException) -> bool:
    return code_of(error) in MISSING


def is_about_content(error: BaseException) -> bool:
    return code_of(error).rpartition(".")[2] in NEVER


def refusal(error: BaseException, what: str) -> OutboxError:
    """An error of the driver as ours; ``what`` could not be done because of it."""
    if isinstance(error, OutboxError):
        return error
    if isinstance(error, exceptions.ClientError):
        code, said = code_of(error), str(error.response.get("Error", {}).get("Message") or "")
        because = f"{said} ({code})" if code else said
        if code in MISSING:
            because = f"there is no such queue ({code})"
        elif code in _WHO:
            because += ". Look at the access key, its secret, the session token, and this machine's clock"
        elif code in _DENIED:
            because += ". Grant sqs:SendMessage, ReceiveMessage, DeleteMessage, ChangeMessageVisibility, GetQueueUrl, "
            because += "GetQueueAttributes and ListQueues (or name the groups: groups=…), and CreateQueue or declare=no"
        return Unavailable(f"sqs: {what}: {because}")
    if isinstance(error, (exceptions.NoCredentialsError, exceptions.PartialCredentialsError)):
        return Unavailable(
            f"sqs: {what}: there are no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the "
            "role of this machine"
        )
    if isinstance(error, exceptions.ParamValidationError):
        return Refused(f"sqs: {what}: {error}")
    if isinstance(error, TimeoutError):
        return Unavailable(f"sqs: {what}: no answer in time")
    return Unavailable(f"sqs: {what}: {error or type(error).__name__}")


def is_about_all(error: BaseException) -> bool:
    """Whether another topic would fare no better."""
    if isinstance(error, exceptions.ClientError):
        code = code_of(error)
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return code in _WHO or code in THROTTLED or status >= 500
    return True
