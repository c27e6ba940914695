"""Settings of every served reward, from `rewards.options` or from a line of `score`."""

from collections.abc import Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from r1_grading.base.errors import Cause, UserError, did_you_mean
from r1_grading.base.values import read_field


class ServiceSettings(BaseModel):
    """Settings that every served reward has."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    url: str = Field(
        description="address of the service: http://host:port, or the base URL in its manual"
    )
    model: str = Field(min_length=1, description="the name it is served under")
    api_key_env: str | None = Field(None, description="environment variable of the key; null: none")
    timeout_seconds: float = Field(120.0, gt=0, description="limit for one try")
    retry_seconds: float = Field(
        300.0, ge=0, description="how long the service may be absent before the run stops"
    )
    concurrency: int = Field(32, ge=1, description="requests at once")
    max_chars: int = Field(20_000, ge=100, description="a longer response loses its middle")

    @field_validator("*", mode="before")
    @classmethod
    def _read_scalar(cls, value: Any, info: ValidationInfo) -> Any:
        return read_field(cls, value, info)

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            message = f"url must start with http:// or https://, got {url!r}"
            raise UserError(message, key="url", cause=Cause.MALFORMED)
        try:
            is_complete = bool(urlsplit(url).hostname) and urlsplit(url).port != 0
        except ValueError:  # of the port
            is_complete = False
        if not is_complete:
            message = f"url must have a host, and a port up to 65535 or none, got {url!r}"
            raise UserError(message, key="url", cause=Cause.MALFORMED)
        return url.rstrip("/")

    @property
    def api_base(self) -> str:
        """The `url` as OpenAI's clients take it: with the API version where it has no path."""
        return self.url if urlsplit(self.url).path else f"{self.url}/v1"


CAUSE_BY_TYPE = {
    "extra_forbidden": Cause.UNKNOWN,
    "missing": Cause.MISSING,
    "string_too_short": Cause.EMPTY,
    **dict.fromkeys(("greater_than", "greater_than_equal"), Cause.OUT_OF_RANGE),
}
"""What pydantic's types of errors are to a user; any other is a malformed value."""
Settings = TypeVar("Settings", bound=ServiceSettings)


def read_settings(kind: str, settings_type: type[Settings], options: Mapping[str, Any]) -> Settings:
    """Parse `options` as settings of reward `kind`.

    Args:
        kind: the reward, for errors.
        settings_type: the model of its settings.
        options: name → value.

    Raises:
        UserError: an option is unknown or has an invalid value. One line has all mistakes, with the
            nearest known name for an unknown one; key and cause are the first one's."""
    try:
        return settings_type.model_validate(dict(options))
    except ValidationError as failure:
        mistakes = [_explain_error(error, settings_type) for error in failure.errors()]
        name, cause = _option_at_fault(failure.errors()[0])
        raise UserError(
            f"rewards.options of {kind}: " + "; ".join(mistakes),
            key=f"rewards.options.{kind}.{name}",
            cause=cause,
        ) from None


def _option_at_fault(error: Mapping[str, Any]) -> tuple[str, Cause]:
    """Return the option at fault in one of pydantic's errors, and what is wrong with it."""
    raised_error = error.get("ctx", {}).get("error")
    if isinstance(raised_error, UserError):
        return raised_error.key, raised_error.cause
    return ".".join(map(str, error["loc"])), CAUSE_BY_TYPE.get(error["type"], Cause.MALFORMED)


def _explain_error(error: Mapping[str, Any], settings_type: type[ServiceSettings]) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        options = settings_type.model_fields
        hint = did_you_mean(name, options, "{}") or f"; known: {', '.join(options)}"
        return f"unknown option {name}{hint}"
    if error["type"] == "missing":
        return f"{name} must be set ({settings_type.model_fields[name].description})"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{name}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"
